"""A host's own file: it takes away, never gives, and says what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from signers import DAY, LIMITS, NOW, TINY, WHITELIST

from glasshive.graph.ops import OPS
from glasshive.security.errors import BadPolicy, NotAllowed
from glasshive.security.host_policy import MAX_FILE_BYTES, HostRules, read_host_rules
from glasshive.security.keys import Identity
from glasshive.security.policy import Policy
from glasshive.security.whitelist import limits_by_name

EVE = Identity(b"\7" * 32).peer_id


def refused(path: Path) -> str:
    with pytest.raises(BadPolicy) as caught:
        read_host_rules(path)
    return str(caught.value)


def test_a_file_narrows_and_the_policy_says_so(tmp_path: Path) -> None:
    place = tmp_path / "policy.toml"
    place.write_text(
        'deny_ops = ["linalg_svd", "sort"]\nread = ["model.layers.*.**"]\nwrite = []\n'
        f'models = ["{TINY}"]\nrefuse_clients = ["{EVE}"]\n[limits]\nseconds = 60\n'
    )
    rules = read_host_rules(place)
    here = Policy.effective(WHITELIST, NOW, host=rules)
    assert here.ops == WHITELIST.ops.keys() - {"linalg_svd"}
    assert here.readable == ("model.layers.*.**",)
    assert here.writable == ()
    assert here.models == {TINY: "tiny"}
    assert here.limits == replace(LIMITS, seconds=60)
    assert here.source == "whitelist 7 of swarm 'public' with the host's own file"
    with pytest.raises(NotAllowed, match=f"client {EVE} may not use this host by {here.source}"):
        here.check_client(EVE)


def test_a_denied_op_wins_over_an_allowed_one() -> None:
    rules = HostRules.from_text('ops = ["add", "mul"]\ndeny_ops = ["mul"]')
    assert Policy.effective(WHITELIST, NOW, host=rules).ops == {"add"}


def test_a_misspelt_denied_op_is_an_error_and_not_still_allowed() -> None:
    with pytest.raises(BadPolicy) as caught:
        HostRules.from_text('deny_ops = ["linalg_svdd"]')
    assert str(caught.value) == (
        "deny_ops has 'linalg_svdd', which is no op of this release; did you mean linalg_svd?"
    )


def test_the_file_is_bounded_and_named(tmp_path: Path) -> None:
    place = tmp_path / "policy.toml"
    assert refused(place).startswith(f"can't read the host's own file {place}: No such file")
    place.write_text("#" * MAX_FILE_BYTES)
    assert read_host_rules(place) == HostRules()
    place.write_text("#" * (MAX_FILE_BYTES + 1))
    assert (
        refused(place)
        == f"the host's own file {place}: longer than the 65536 bytes that are allowed"
    )
    place.write_bytes(b"\xff")
    assert "no UTF-8 text" in refused(place)
    place.write_text('deny = ["add"]')
    assert refused(place).startswith(f"the host's own file {place}: unknown field deny; did you")


# No root is configured --------------------------------------------------------------------------


def test_without_a_root_the_release_is_what_counts() -> None:
    here = Policy.of_release()
    assert here.ops == OPS.keys()
    assert (here.readable, here.writable, here.models) == (("**",), ("**",), None)
    assert (here.version, here.signers, here.floor_reason, here.ends_seconds) == (0, (), "", None)
    assert here.describe()[0] == "Policy: this release (no root is configured), signed by nobody."


def test_the_own_file_narrows_that_too() -> None:
    here = Policy.of_release(HostRules.from_text('deny_ops = ["add"]\n[limits]\nnodes = 7'))
    assert here.ops == OPS.keys() - {"add"}
    assert here.limits == replace(Policy.of_release().limits, nodes=7)
    with pytest.raises(BadPolicy, match="nodes = 30000, more than 20000, which this rel"):
        Policy.of_release(HostRules.from_text("limits.nodes = 30000"))


# The root's own expiry --------------------------------------------------------------------------


def test_an_expired_root_leaves_the_floor() -> None:
    until = NOW + DAY
    good = Policy.effective(WHITELIST, until - 1, root_expires_seconds=until)
    assert good.floor_reason == ""
    assert good.ends_seconds == until
    gone = Policy.effective(WHITELIST, until, root_expires_seconds=until)
    assert gone.floor_reason.startswith("the root expired at ")
    assert gone.ops == {"add", "mul", "softmax"}
    assert gone.writable == ()
    floor = limits_by_name(Policy.floor().limits)
    assert all(value <= floor[name] for name, value in limits_by_name(gone.limits).items())


def test_the_whitelist_may_end_first() -> None:
    long = WHITELIST.expires_seconds + DAY
    here = Policy.effective(WHITELIST, NOW, root_expires_seconds=long)
    assert here.ends_seconds == WHITELIST.expires_seconds
