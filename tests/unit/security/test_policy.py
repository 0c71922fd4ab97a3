"""A host's policy: nothing that whitelist, own file and release don't all allow, and it says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from signers import BAD_CLIENT, BAD_PEER, DAY, LIMITS, NOW, TINY, WHITELIST

from glasshive.dht.messages import TRACE_PROTOCOL
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import GraphError, OverBudget
from glasshive.graph.graph import (
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Site,
    Skip,
    Write,
)
from glasshive.graph.ops import OPS
from glasshive.security.errors import BadPolicy, NotAllowed
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import PROTOCOL, Policy, diff_whitelists
from glasshive.security.whitelist import LIMIT_NAMES, limits_by_name

R0 = Ref(NodeId(0))
MLP = "model.layers.3.mlp"
NORM = "model.norm"


def graph_of(*nodes: Node) -> Graph:
    return Graph({NodeId(number): node for number, node in enumerate(nodes)})


READ = Read(Site(NORM, "output"), 0)
GOOD = graph_of(
    READ,
    Op("add", (R0, 1, 1)),
    Const(b"\1" * 32, DType.FLOAT32, (2, 3)),
    Write(Site(MLP, "output"), 0, R0, "set"),
    Skip("model.layers.1.self_attn.o_proj", 0, R0),
    Call(NORM, (R0,)),
    Param(NORM, "weight"),
    Save(R0, "x"),
)


def policy(**changes: Any) -> Policy:
    return Policy.effective(replace(WHITELIST, **changes), NOW)


def refusal(
    graph: Graph, by: Policy, kind: type[GraphError] = NotAllowed
) -> tuple[int | None, str]:
    with pytest.raises(kind) as caught:
        by.check_graph(graph)
    return caught.value.node, str(caught.value)


# What runs --------------------------------------------------------------------------------------


def test_what_is_allowed_runs() -> None:
    policy().check_graph(GOOD)


def test_an_op_outside_is_named_with_its_node_and_the_nearest() -> None:
    node, text = refusal(graph_of(READ, Op("sub", (R0, 1, 1))), policy())
    assert node == 1
    assert text.startswith("node 1: the op 'sub' is not allowed here by whitelist 7 of swarm")
    assert "the nearest allowed: " in text
    assert refusal(graph_of(READ, Op("sub", (R0, 1, 1))), policy(ops={}))[1].endswith(
        "no op is allowed"
    )


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_of_the_release_runs_only_if_listed(name: str) -> None:
    graph = graph_of(READ, Op(name, ()))
    policy(ops={name: OPS[name].version}).check_graph(graph)
    refusal(graph, policy(ops={one: spec.version for one, spec in OPS.items() if one != name}))


@pytest.mark.parametrize(
    ("node", "done"),
    [
        (Read(Site("lm_head", "output"), 0), "reading 'lm_head'"),
        (Call("lm_head", (R0,)), "calling 'lm_head'"),
        (Param("lm_head", "weight"), "reading a weight of 'lm_head'"),
        (Write(Site("lm_head", "output"), 0, R0, "inplace"), "writing 'lm_head'"),
        (Skip("lm_head", 0, R0), "skipping 'lm_head'"),
        (Read(Site("", "output"), 0), "reading the model itself"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_outside_is_named_with_its_node_and_the_nearest(node: Node, done: str) -> None:
    narrow = policy(readable=("model.norm",), writable=("model.layers.*.mlp",))
    at, text = refusal(graph_of(READ, node), narrow)
    assert at == 1
    assert f"node 1: {done} is not allowed here by whitelist 7" in text
    writes = isinstance(node, Write | Skip)
    assert text.endswith("written: model.layers.*.mlp" if writes else "read: model.norm")


def test_to_read_is_not_to_write() -> None:
    narrow = policy(readable=(MLP,), writable=())
    narrow.check_graph(graph_of(Read(Site(MLP, "output"), 0)))
    graph = graph_of(Read(Site(MLP, "output"), 0), Write(Site(MLP, "output"), 0, R0, "set"))
    assert refusal(graph, narrow)[1].endswith("no module may be written")


def test_nodes_steps_and_constants_are_bounded() -> None:
    def limited(**changes: int) -> Policy:
        return policy(limits=replace(LIMITS, **changes))

    limited(nodes=8, steps=1, const_bytes=24).check_graph(GOOD)
    assert "8 nodes, but 7 are allowed" in refusal(GOOD, limited(nodes=7), OverBudget)[1]
    assert "24 bytes, but 23 are" in refusal(GOOD, limited(const_bytes=23), OverBudget)[1]
    for later in (
        Read(Site(NORM, "output", (), 2), 0),
        Write(Site(MLP, "output", (), 2), 0, R0, "set"),
        Skip(MLP, 0, R0, 2),
    ):
        limited(steps=3).check_graph(graph_of(READ, later))
        node, text = refusal(graph_of(READ, later), limited(steps=2), OverBudget)
        assert node == 1
        assert "step 2 of a generation, but 2 steps are" in text


def test_one_constant_counts_once() -> None:
    const = Const(b"\1" * 32, DType.FLOAT32, (2, 3))
    policy(limits=replace(LIMITS, const_bytes=24)).check_graph(graph_of(const, const))


def test_models_and_revoked() -> None:
    here = policy()
    assert here.allows_model(TINY)
    here.check_model(TINY, "tiny")
    other = ModelId("ef" * 32)
    assert not here.allows_model(other)
    with pytest.raises(
        NotAllowed, match=r"'mine' with manifest efefefefefefefef\.\.\. is not .* tiny"
    ):
        here.check_model(other, "mine")
    assert policy(models=None).allows_model(other)
    assert here.is_revoked(BAD_PEER, "peer")
    assert here.is_revoked(BAD_CLIENT, "client")
    assert not here.is_revoked(BAD_PEER, "client")
    assert not here.is_revoked(BAD_CLIENT, "peer")


# This release -----------------------------------------------------------------------------------


def test_the_release_narrows() -> None:
    wide = policy(ops={"add": OPS["add"].version, "mul": OPS["mul"].version + 1, "telepathy": 1})
    assert wide.ops == {"add"}
    assert policy(limits=replace(LIMITS, nodes=10**9)).limits.nodes == 20_000


def test_the_protocol_is_that_of_the_streams() -> None:
    assert TRACE_PROTOCOL.rpartition("/")[2] == str(PROTOCOL)


# The floor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "changes", "reason"),
    [
        (WHITELIST.expires_seconds, {}, "the whitelist expired at 2027-02-13 08:00 UTC"),
        (WHITELIST.issued_seconds - 601, {}, "in the future by this machine's clock"),
        (NOW, {"min_protocol": PROTOCOL + 1}, "wants protocol 2 and this release speaks 1"),
    ],
)
def test_out_of_force_only_the_floor_is_left(now: int, changes: Any, reason: str) -> None:
    here = Policy.effective(replace(WHITELIST, **changes), now)
    floor = Policy.floor()
    assert reason in here.floor_reason
    assert here.ops == {"add", "mul", "softmax"}  # and not linalg_svd or pick
    assert here.writable == ()
    assert all(
        value <= limits_by_name(floor.limits)[name]
        for name, value in limits_by_name(here.limits).items()
    )
    assert here.is_revoked(BAD_PEER, "peer")
    assert not here.allows_model(ModelId("ef" * 32))
    assert any(reason in line for line in here.describe())
    assert reason in refusal(graph_of(READ, Op("linalg_svd", (R0, False))), here)[1]


@pytest.mark.parametrize("now", [WHITELIST.expires_seconds - 1, WHITELIST.issued_seconds - 600])
def test_in_force_to_the_second(now: int) -> None:
    assert Policy.effective(WHITELIST, now).floor_reason == ""


def test_the_floor_is_ten_pure_ops_and_reads() -> None:
    floor = Policy.effective(None, NOW)
    assert floor == Policy.floor()
    assert len(floor.ops) == 10
    assert not any(OPS[name].random or OPS[name].guarded for name in floor.ops)
    floor.check_graph(graph_of(READ, Op("add", (R0, 1, 1)), Save(R0, "x")))
    refusal(GOOD, floor)
    assert floor.limits.seconds == 10
    assert floor.limits.steps == 1


def test_the_floor_gives_nothing_that_the_whitelist_does_not() -> None:
    narrow = replace(WHITELIST, ops={"mul": 1}, readable=("a",), limits=replace(LIMITS, seconds=2))
    here = Policy.effective(narrow, WHITELIST.expires_seconds + 1)
    assert (here.ops, here.readable, here.limits.seconds) == ({"mul"}, ("a",), 2)


def test_a_whitelist_that_counts_no_more_only_takes_away() -> None:
    """Failed with the bare floor given for it."""
    narrow = replace(WHITELIST, ops={"mul": 1}, readable=("a",), limits=replace(LIMITS, seconds=2))
    here = Policy.effective(narrow, NOW, dropped="its keys were taken away")
    assert (here.ops, here.readable, here.writable) == ({"mul"}, ("a",), ())
    assert here.limits == Policy.floor().limits.narrowed(narrow.limits)
    assert here.models == WHITELIST.models
    assert here.is_revoked(BAD_PEER, "peer")
    assert here.is_revoked(BAD_CLIENT, "client")
    assert (here.version, here.signers, here.ends_seconds) == (0, (), None)
    assert "its keys were taken away" in here.who


# The host's own file ----------------------------------------------------------------------------

RULES = """
ops = ["add", "softmax"]
read = ["model.layers.*.**", "model.norm"]
write = []
models = ["{tiny}"]
refuse_peers = ["{peer}"]
refuse_clients = ["{peer}"]
[limits]
seconds = 60
traces_per_client = 1
"""
PEER = Identity(b"\3" * 32).peer_id


def test_a_host_narrows() -> None:
    host = HostRules.from_text(RULES.format(tiny=TINY, peer=PEER))
    here = Policy.effective(WHITELIST, NOW, host=host)
    assert here.ops == {"add", "softmax"}
    assert here.readable == ("model.layers.*.**", "model.norm")
    assert here.writable == ()
    assert here.models == {TINY: "tiny"}
    assert here.limits == replace(LIMITS, seconds=60, traces_per_client=1)
    assert here.revoked_peers == {BAD_PEER, PEER}
    assert here.revoked_clients == {BAD_CLIENT, PEER}


def test_an_empty_file_changes_nothing() -> None:
    assert Policy.effective(WHITELIST, NOW, host=HostRules.from_text("")) == policy()


@pytest.mark.parametrize(
    ("text", "wider"),
    [
        ('ops = ["add", "sub"]', "the op 'sub', which"),
        ('write = ["model.layers.*.mlp.**"]', "writing 'model.layers.*.mlp.**', which"),
        ('write = ["**"]', "writing '**', which"),
        (f'models = ["{"ef" * 32}"]', "the model 'efef"),
        ("limits.seconds = 301", "limits.seconds = 301, more than 300, which"),
        ("limits.nodes = 20001", "limits.nodes = 20001, more than 5000, which"),
    ],
)
def test_what_is_wider_is_named_and_never_allowed(text: str, wider: str) -> None:
    host = HostRules.from_text(text)
    with pytest.raises(BadPolicy) as caught:
        host.check_narrows(policy())
    assert f"the host's own file allows {wider}" in str(caught.value)
    assert "whitelist 7 of swarm 'public' does not" in str(caught.value)
    here, alone = Policy.effective(WHITELIST, NOW, host=host), policy()
    assert here.ops <= alone.ops
    assert set(here.writable) <= set(alone.writable)
    assert set(here.models or ()) <= set(alone.models or ())
    assert here.limits.narrowed(alone.limits) == here.limits


def test_reads_that_are_wider_are_named() -> None:
    narrow = replace(WHITELIST, readable=("model.*",))
    with pytest.raises(BadPolicy, match="reading '\\*\\*', which"):
        HostRules.from_text('read = ["**"]').check_narrows(Policy.effective(narrow, NOW))


def test_a_host_chooses_among_all_models() -> None:
    host = HostRules.from_text(f'models = ["{TINY}"]')
    here = Policy.effective(replace(WHITELIST, models=None), NOW, host=host)
    assert here.allows_model(TINY)
    assert not here.allows_model("ef" * 32)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("op = []", "unknown field op; did you mean ops?"),
        ("[limits]\nsecond = 1", "unknown field limits.second; did you mean limits.seconds?"),
        ("[limits]\nseconds = 1.5", "limits.seconds is 1.5; a whole number"),
        ('read = ["a*"]', "read has 'a*', which is no pattern"),
        ("ops = [1]", "ops is not a list of different texts"),
        ('ops = ["ad"]', "ops has 'ad', which is no op of this release; did you mean"),
        ('models = ["tiny"]', "models has 'tiny', which is no manifest id (64 hexadecimal"),
        (f"limits.nodes = {'9' * 5000}", "a number has too many digits"),
        (f"limits.nodes = 0x{'f' * 5000}", "a number has too many digits"),
        ('refuse_peers = ["x"]', "refuse_peers has no peer id"),
        ("ops = [", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_its_field(text: str, says: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        HostRules.from_text(text)
    assert says in str(caught.value)


# What is told -----------------------------------------------------------------------------------


def test_description_says_all_that_can_and_cannot_run() -> None:
    lines = Policy.effective(WHITELIST, NOW, signers=("ab" * 32, "cd" * 32)).describe()
    text = "\n".join(lines)
    assert lines[0] == (
        "Policy: whitelist 7 of swarm 'public', signed by abababababababab, cdcdcdcdcdcdcdcd, "
        "until 2027-02-13 08:00 UTC."
    )
    assert "Others can run 5 ops: add, linalg_svd, mul, pick, softmax." in text
    (cannot,) = [line for line in lines if line.startswith("Others can't run")]
    told = set(cannot.partition(": ")[2].partition(";")[0].rstrip(".").split(", "))
    assert told == OPS.keys() - WHITELIST.ops.keys()
    assert "Others can read, call and fetch the weights of every module." in text
    assert "Others can write model.layers.*.mlp, model.layers.*.self_attn.**." in text
    assert "tiny (abababababababab...)" in text
    assert all(f"{name} {value:,}" in text for name, value in limits_by_name(LIMITS).items())
    assert "Revoked: 1 host, 1 client, 2 versions." in text


def test_one_op_is_one() -> None:
    """Failed with "1 ops"."""
    others = {name: spec.version for name, spec in OPS.items() if name != "add"}
    lines = Policy.effective(replace(WHITELIST, ops=others), NOW).describe()
    assert any(line.startswith("Others can't run 1 op of this release: add; nor") for line in lines)
    lines = Policy.effective(replace(WHITELIST, ops={"add": OPS["add"].version}), NOW).describe()
    assert "Others can run 1 op: add." in lines


def test_all_ops_are_not_listed() -> None:
    lines = Policy.of_release().describe()
    assert f"Others can run all {len(OPS)} ops of this release, and no other code." in lines
    assert not any("softmax" in line for line in lines)


def test_difference_says_what_changed_and_nothing_else() -> None:
    assert diff_whitelists(WHITELIST, WHITELIST) == []
    new = replace(
        WHITELIST,
        version=8,
        ops={"add": 2, "mul": 1, "softmax": 1, "pick": 1, "exp": 1},
        writable=("model.layers.*.mlp",),
        models={TINY: "small"},
        revoked_clients=frozenset(),
        revoked_versions=frozenset([3, 10]),
        limits=replace(LIMITS, seconds=60),
    )
    assert diff_whitelists(WHITELIST, new) == [
        "~ version: 7 -> 8",
        "- op linalg_svd",
        "+ op exp",
        "~ op add: 1 -> 2",
        "- write model.layers.*.self_attn.**",
        f"- model {'cd' * 32}",
        f"~ model {TINY}: tiny -> small",
        f"- revoked client {BAD_CLIENT}",
        "- revoked version 9",
        "+ revoked version 10",
        "~ limit seconds: 300 -> 60",
    ]
    assert "+ models: every one" in diff_whitelists(WHITELIST, replace(WHITELIST, models=None))


@pytest.mark.parametrize(
    "change",
    [
        {"swarm": "lab"}, {"version": 8}, {"issued_seconds": NOW}, {"expires_seconds": NOW + DAY},
        {"min_protocol": 2}, {"ops": {}}, {"readable": ()}, {"writable": ()}, {"models": None},
        {"models": {}}, {"revoked_peers": frozenset()}, {"revoked_clients": frozenset()},
        {"revoked_versions": frozenset()},
        *({"limits": replace(LIMITS, **{name: 1})} for name in LIMIT_NAMES),
    ],
    ids=str,
)  # fmt: skip
def test_no_change_goes_unsaid(change: dict[str, Any]) -> None:
    assert diff_whitelists(WHITELIST, replace(WHITELIST, **change))
