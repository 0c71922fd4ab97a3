"""What one host really runs: whitelist, the host's own file and this release, intersected.

Rules:

1. Nothing is allowed that one of the three doesn't allow. No field means "the rest".
2. A host's own file (host_policy.py) can only narrow.
3. A whitelist that is expired, or whose root is, or that was issued more than 10 minutes in the
   clock's future, or that wants a newer protocol, or whose keys a newer root took away, allows
   only what the floor allows too: ten pure ops, reads, small limits. Revoked stays revoked.
4. Who is revoked by one side is revoked.
5. Where no root is configured, as in a swarm on one machine, there is no whitelist: this release
   and the host's own file are what counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Literal, TypeVar

from glasshive.graph.codec import DEFAULT_LIMITS
from glasshive.graph.errors import OverBudget
from glasshive.graph.graph import (
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Save,
    Skip,
    Write,
)
from glasshive.graph.ops import OPS
from glasshive.graph.outline import GENERATOR
from glasshive.graph.tensors import TensorSpec
from glasshive.security.errors import NotAllowed
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.module_patterns import common, matches, nearest_patterns
from glasshive.security.whitelist import (
    FUTURE_SECONDS,
    MAX_LIMIT,
    Limits,
    Whitelist,
    limits_by_name,
)

__all__ = ["PROTOCOL", "Policy", "counted", "diff_whitelists", "why_floor"]

PROTOCOL: Final = 1
"""The protocol that this release speaks: the number at the end of its streams' names."""

_RELEASE_LIMITS: Final = Limits(
    graph_bytes=DEFAULT_LIMITS.graph_bytes,
    nodes=DEFAULT_LIMITS.nodes,
    const_bytes=MAX_LIMIT,
    peak_bytes=MAX_LIMIT,
    flops=MAX_LIMIT,
    seconds=MAX_LIMIT,
    saved_bytes=MAX_LIMIT,
    steps=DEFAULT_LIMITS.steps,
    batch_rows=MAX_LIMIT,
    context_tokens=MAX_LIMIT,
    traces_per_client=MAX_LIMIT,
    generations_per_client=MAX_LIMIT,
)
_FLOOR_OPS: Final = frozenset(
    ("add", "mean", "mul", "reshape", "select", "slice", "softmax", "sub", "sum", "to")
)
_FLOOR_LIMITS: Final = Limits(
    graph_bytes=64 * 1024,
    nodes=256,
    const_bytes=1 << 20,
    peak_bytes=256 << 20,
    flops=10**10,
    seconds=10,
    saved_bytes=16 << 20,
    steps=1,
    batch_rows=4,
    context_tokens=512,
    traces_per_client=1,
    generations_per_client=0,
)
_K = TypeVar("_K", bound=str)
_EVERY_MODULE: Final = ("**",)


@dataclass(frozen=True, slots=True)
class Policy:
    """What this host runs for others. Made by `effective`, `of_release` or `floor`.

    `models` gives names by manifest id; None allows each model that the host serves. `source` says
    in words whose policy it is, `floor_reason` why only the floor is allowed, or is empty.
    `ends_seconds` is when it must be made anew: whitelist or root expires then.
    """

    source: str
    signers: tuple[str, ...]
    version: int
    floor_reason: str
    ends_seconds: int | None
    ops: frozenset[str]
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    models: Mapping[ModelId, str] | None
    limits: Limits
    revoked_peers: frozenset[PeerId]
    revoked_clients: frozenset[PeerId]
    revoked_versions: frozenset[int]

    @classmethod
    def floor(cls, reason: str = "there is no whitelist") -> Policy:
        """What a host runs at most when no whitelist is in force: reads and ten pure ops."""
        return cls(
            source="the floor",
            signers=(),
            version=0,
            floor_reason=reason,
            ends_seconds=None,
            ops=_FLOOR_OPS & OPS.keys(),
            readable=_EVERY_MODULE,
            writable=(),
            models=None,
            limits=_FLOOR_LIMITS,
            revoked_peers=frozenset(),
            revoked_clients=frozenset(),
            revoked_versions=frozenset(),
        )

    @classmethod
    def of_release(cls, host: HostRules | None = None) -> Policy:
        """What a host runs where no root is configured: all that this release can, or what is left
        of it by the host's own file. Raises BadPolicy for a wider file."""
        policy = cls(
            source="this release (no root is configured)",
            signers=(),
            version=0,
            floor_reason="",
            ends_seconds=None,
            ops=frozenset(OPS),
            readable=_EVERY_MODULE,
            writable=_EVERY_MODULE,
            models=None,
            limits=_RELEASE_LIMITS,
            revoked_peers=frozenset(),
            revoked_clients=frozenset(),
            revoked_versions=frozenset(),
        )
        if host is None:
            return policy
        host.check_narrows(policy)
        return policy._narrowed_by(host)

    @classmethod
    def effective(
        cls,
        whitelist: Whitelist | None,
        now_seconds: float,
        *,
        host: HostRules | None = None,
        signers: Iterable[str] = (),
        root_expires_seconds: int | None = None,
        dropped: str = "",
    ) -> Policy:
        """What `whitelist`, the host's own rules and this release allow together.

        `signers` are the ids of the keys whose signatures were verified, and
        `root_expires_seconds` is when the root that names them expires. `dropped` is why the
        whitelist counts no more, if it doesn't: then it only takes away from the floor. What is
        wider in the host's rules than in the whitelist is left out, as all that one side doesn't
        allow; `HostRules.check_narrows` names it.
        """
        policy = cls.floor() if whitelist is None else cls._of_whitelist(whitelist, tuple(signers))
        if host is not None:
            policy = policy._narrowed_by(host)
        if whitelist is None:
            return policy
        if dropped:
            return replace(policy._at_the_floor(dropped), version=0)  # none is in force
        root_ends = MAX_LIMIT if root_expires_seconds is None else root_expires_seconds
        reason = why_floor(whitelist, root_ends, now_seconds)
        if reason:
            return policy._at_the_floor(reason)
        return replace(policy, ends_seconds=min(whitelist.expires_seconds, root_ends))

    @classmethod
    def _of_whitelist(cls, whitelist: Whitelist, signers: tuple[str, ...]) -> Policy:
        return cls(
            source=f"whitelist {whitelist.version} of swarm {whitelist.swarm!r}",
            signers=signers,
            version=whitelist.version,
            floor_reason="",
            ends_seconds=whitelist.expires_seconds,
            ops=frozenset(
                name
                for name, version in whitelist.ops.items()
                if name in OPS and OPS[name].version == version
            ),
            readable=whitelist.readable,
            writable=whitelist.writable,
            models=whitelist.models,
            limits=whitelist.limits.narrowed(_RELEASE_LIMITS),
            revoked_peers=whitelist.revoked_peers,
            revoked_clients=whitelist.revoked_clients,
            revoked_versions=whitelist.revoked_versions,
        )

    def _narrowed_by(self, host: HostRules) -> Policy:
        models = self.models
        if host.models is not None:
            named = {one: one[:16] for one in host.models} if models is None else models
            models = {one: name for one, name in named.items() if one in host.models}
        numbers = {
            name: min(value, host.limits.get(name, value))
            for name, value in limits_by_name(self.limits).items()
        }
        own = "" if host == HostRules() else " with the host's own file"
        return replace(
            self,
            source=self.source + own,
            ops=(self.ops if host.ops is None else self.ops & host.ops) - host.denied_ops,
            readable=_both(self.readable, host.readable),
            writable=_both(self.writable, host.writable),
            models=models,
            limits=Limits(**numbers),
            revoked_peers=self.revoked_peers | host.refused_peers,
            revoked_clients=self.revoked_clients | host.refused_clients,
        )

    def _at_the_floor(self, reason: str) -> Policy:
        """What this policy and the floor both allow."""
        floor = Policy.floor(reason)
        return replace(
            self,
            floor_reason=reason,
            ends_seconds=None,
            ops=self.ops & floor.ops,
            readable=common(self.readable, floor.readable),
            writable=common(self.writable, floor.writable),
            limits=self.limits.narrowed(floor.limits),
        )

    # What is asked of it

    def check_graph(self, graph: Graph) -> None:
        """Return if every node of `graph` is allowed here.

        Looks at ops, modules, nodes, steps and the bytes of constants; the other limits need the
        model's shapes or the bytes and are for admission. Raises NotAllowed or OverBudget, with the
        node where there is one.
        """
        limits = self.limits
        if len(graph) > limits.nodes:
            raise OverBudget(f"{len(graph)} nodes, but {limits.nodes} are allowed by {self.who}")
        allowed: set[tuple[bool, str]] = set()
        constants: dict[bytes, int] = {}
        for node_id, node in graph.nodes.items():
            self._check_node(node_id, node, allowed)
            if isinstance(node, Const):
                constants[node.digest] = TensorSpec(node.dtype, node.shape).nbytes
        if sum(constants.values()) > limits.const_bytes:
            raise OverBudget(
                f"constants of {sum(constants.values())} bytes, but {limits.const_bytes} are "
                f"allowed by {self.who}"
            )

    def _check_node(self, node_id: NodeId, node: Node, allowed: set[tuple[bool, str]]) -> None:
        if isinstance(node, Op):
            if node.name not in self.ops:
                raise NotAllowed(self._op_refused(node_id, node.name), node=node_id)
            return
        if isinstance(node, Const | Save):
            return
        writes = isinstance(node, Write | Skip)
        module = node.site.module if isinstance(node, Read | Write) else node.module
        if (writes, module) not in allowed and (writes or module != GENERATOR):
            granted = self.writable if writes else self.readable
            if not any(matches(pattern, module) for pattern in granted):
                raise NotAllowed(self._module_refused(node_id, node, module), node=node_id)
            allowed.add((writes, module))
        if isinstance(node, Call | Param):
            return
        step = node.step if isinstance(node, Skip) else node.site.step
        if step >= self.limits.steps:
            raise OverBudget(
                f"node {node_id}: step {step} of a generation, but {self.limits.steps} steps are "
                f"allowed by {self.who}",
                node=node_id,
            )

    def _op_refused(self, node_id: NodeId, name: str) -> str:
        near = difflib.get_close_matches(name[:64], self.ops, n=3, cutoff=0.0)
        hint = f"the nearest allowed: {', '.join(near)}" if near else "no op is allowed"
        return f"node {node_id}: the op {name[:64]!r} is not allowed here by {self.who}; {hint}"

    def _module_refused(self, node_id: NodeId, node: Node, module: str) -> str:
        writes = isinstance(node, Write | Skip)
        done = {
            Read: "reading", Write: "writing", Skip: "skipping", Call: "calling",
            Param: "reading a weight of",
        }[type(node)]  # fmt: skip
        granted = self.writable if writes else self.readable
        near = nearest_patterns(module, granted)
        what = "written" if writes else "read"
        hint = (
            f"the nearest that may be {what}: {', '.join(near)}"
            if near
            else f"no module may be {what}"
        )
        name = repr(module[:128]) if module else "the model itself"
        return f"node {node_id}: {done} {name} is not allowed here by {self.who}; {hint}"

    @property
    def who(self) -> str:
        """Whose policy it is, in words, with why only the floor counts."""
        return f"{self.source} ({self.floor_reason})" if self.floor_reason else self.source

    def allows_model(self, model_id: str) -> bool:
        """Whether the model of this manifest id may be served here."""
        return self.models is None or model_id in self.models

    def check_model(self, model_id: ModelId, name: str) -> None:
        """Return if the model may be served. Raises NotAllowed, which names what may be."""
        if not self.allows_model(model_id):
            names = ", ".join(sorted((self.models or {}).values())[:5]) or "none"
            raise NotAllowed(
                f"the model {name!r} with manifest {model_id[:16]}... is not allowed by "
                f"{self.source}; allowed: {names}"
            )

    def check_client(self, key: PeerId) -> None:
        """Return if the client may use this host. Raises NotAllowed."""
        if self.is_revoked(key, "client"):
            raise NotAllowed(
                f"the client {key} may not use this host by {self.source}; ask whoever "
                "signs that, or use another key"
            )

    def check_peer(self, key: PeerId) -> None:
        """Return if the peer may work with this host. Raises NotAllowed."""
        if self.is_revoked(key, "peer"):
            raise NotAllowed(
                f"the peer {key} may not work with this host by {self.source}; leave it out "
                "with avoid="
            )

    def capped(self, limits: Limits) -> Policy:
        """The same with no number above that of `limits`."""
        return replace(self, limits=self.limits.narrowed(limits))

    def is_revoked(self, key: str, role: Literal["peer", "client"]) -> bool:
        """Whether the key of this peer id may not be a host ("peer") or a client any more."""
        return key in (self.revoked_peers if role == "peer" else self.revoked_clients)

    def describe(self) -> list[str]:
        """Lines for the host: exactly what others can and cannot run here, and who signed that."""
        signed = ", ".join(signer[:16] for signer in self.signers) or "nobody"
        until = f", until {_moment(self.ends_seconds)}" if self.ends_seconds is not None else ""
        lines = [f"Policy: {self.source}, signed by {signed}{until}."]
        if self.floor_reason:
            lines.append(f"Only the floor is allowed: {self.floor_reason}.")
        refused = sorted(OPS.keys() - self.ops)
        numbers = limits_by_name(self.limits)
        if refused:
            lines += [
                f"Others can run {counted(len(self.ops), 'op')}: "
                f"{', '.join(sorted(self.ops)) or 'none'}.",
                f"Others can't run {counted(len(refused), 'op')} of this release: "
                f"{', '.join(refused)}; nor any other code.",
            ]
        else:
            lines.append(f"Others can run all {len(OPS)} ops of this release, and no other code.")
        lines += [
            f"Others can read, call and fetch the weights of {_words(self.readable)}.",
            f"Others can write {_words(self.writable)}.",
            f"Models: {_models_in_words(self.models)}.",
            "Limits: " + ", ".join(f"{name} {value:,}" for name, value in numbers.items()) + ".",
            f"Revoked: {counted(len(self.revoked_peers), 'host')}, "
            f"{counted(len(self.revoked_clients), 'client')}, "
            f"{counted(len(self.revoked_versions), 'version')}.",
        ]
        return lines


def counted(count: int, noun: str) -> str:
    """`1 op`, `2 ops`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def diff_whitelists(old: Whitelist, new: Whitelist) -> list[str]:
    """Lines that say what `new` takes (-), gives (+) and changes (~); none if it is equal."""
    lines: list[str] = []
    for name, before, after in (
        ("swarm", old.swarm, new.swarm),
        ("version", old.version, new.version),
        ("issued", _moment(old.issued_seconds), _moment(new.issued_seconds)),
        ("expires", _moment(old.expires_seconds), _moment(new.expires_seconds)),
        ("min_protocol", old.min_protocol, new.min_protocol),
    ):
        if before != after:
            lines.append(f"~ {name}: {before} -> {after}")
    lines += _diff_of_maps("op", old.ops, new.ops)
    lines += _diff_of_sets("read", old.readable, new.readable)
    lines += _diff_of_sets("write", old.writable, new.writable)
    if (old.models is None) != (new.models is None):
        lines.append("+ models: every one" if new.models is None else "- models: every other")
    lines += _diff_of_maps("model", old.models or {}, new.models or {})
    lines += _diff_of_sets("revoked peer", old.revoked_peers, new.revoked_peers)
    lines += _diff_of_sets("revoked client", old.revoked_clients, new.revoked_clients)
    lines += _diff_of_sets(
        "revoked version", map(str, old.revoked_versions), map(str, new.revoked_versions)
    )
    return lines + _diff_of_maps("limit", limits_by_name(old.limits), limits_by_name(new.limits))


def _diff_of_sets(name: str, old: Iterable[str], new: Iterable[str]) -> list[str]:
    before, after = set(old), set(new)
    return [f"- {name} {one}" for one in sorted(before - after)] + [
        f"+ {name} {one}" for one in sorted(after - before)
    ]


def _diff_of_maps(name: str, old: Mapping[_K, object], new: Mapping[_K, object]) -> list[str]:
    lines = _diff_of_sets(name, old, new)
    for one in sorted(old.keys() & new.keys()):
        if old[one] != new[one]:
            lines.append(f"~ {name} {one}: {old[one]} -> {new[one]}")
    return lines


def why_floor(whitelist: Whitelist, root_expires_seconds: int, now_seconds: float) -> str:
    """Why only the floor counts now; empty if the whitelist is in force."""
    if now_seconds >= root_expires_seconds:
        return f"the root expired at {_moment(root_expires_seconds)}"
    if now_seconds >= whitelist.expires_seconds:
        return f"the whitelist expired at {_moment(whitelist.expires_seconds)}"
    if now_seconds < whitelist.issued_seconds - FUTURE_SECONDS:
        return (
            f"the whitelist was issued at {_moment(whitelist.issued_seconds)}, which is in the "
            "future by this machine's clock"
        )
    if whitelist.min_protocol > PROTOCOL:
        return (
            f"the whitelist wants protocol {whitelist.min_protocol} and this release speaks "
            f"{PROTOCOL}; update glasshive"
        )
    return ""


def _both(mine: tuple[str, ...], theirs: tuple[str, ...] | None) -> tuple[str, ...]:
    return mine if theirs is None else common(mine, theirs)


def _words(granted: tuple[str, ...]) -> str:
    if granted == _EVERY_MODULE:
        return "every module"
    return ", ".join(granted) or "no module"


def _models_in_words(models: Mapping[ModelId, str] | None) -> str:
    if models is None:
        return "every one that this host serves"
    return ", ".join(f"{name} ({one[:16]}...)" for one, name in sorted(models.items())) or "none"


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
