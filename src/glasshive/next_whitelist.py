"""The next version of a whitelist: the one before, with what is asked for added and taken away."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from glasshive.graph.errors import GlasshiveError
from glasshive.graph.ops import OPS
from glasshive.security.keys import PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.whitelist import (
    LIMIT_NAMES,
    Limits,
    Whitelist,
    encode_whitelist,
    limits_by_name,
)


class BadChange(GlasshiveError):
    """A change to a whitelist that makes no sense; the text says what would."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is asked of the next whitelist. `every_model` allows all, `lifetime_seconds` of None is
    that of the whitelist before."""

    add_ops: Sequence[str] = ()
    remove_ops: Sequence[str] = ()
    add_readable: Sequence[str] = ()
    remove_readable: Sequence[str] = ()
    add_writable: Sequence[str] = ()
    remove_writable: Sequence[str] = ()
    add_models: Mapping[ModelId, str] = field(default_factory=dict)
    remove_models: Sequence[str] = ()
    every_model: bool = False
    limits: Sequence[str] = ()
    revoke_peers: Sequence[str] = ()
    revoke_clients: Sequence[str] = ()
    restore: Sequence[str] = ()
    revoke_versions: Sequence[int] = ()
    min_protocol: int | None = None
    lifetime_seconds: int | None = None


def next_whitelist(
    before: Whitelist, changes: Changes, *, now_seconds: int, above: int = 0
) -> Whitelist:
    """`before` with the changes, issued now, of the next version that is above `above` too.

    Versions that are revoked are left out. Raises BadChange, and BadWhitelist for fields out of
    range.
    """
    lifetime = changes.lifetime_seconds
    if lifetime is None:
        lifetime = before.expires_seconds - before.issued_seconds
    versions = before.revoked_versions | set(changes.revoke_versions)
    peers = _revoked(before.revoked_peers, changes.revoke_peers, changes.restore)
    clients = _revoked(before.revoked_clients, changes.revoke_clients, changes.restore)
    for one in changes.restore:
        if one not in before.revoked_peers | before.revoked_clients:
            raise BadChange(f"{one[:64]} is not revoked, so there is nothing to restore")
    after = replace(
        before,
        version=_version(max(before.version, above), versions),
        issued_seconds=now_seconds,
        expires_seconds=now_seconds + lifetime,
        min_protocol=changes.min_protocol or before.min_protocol,
        ops=_ops(before.ops, changes),
        readable=_patterns(before.readable, changes.add_readable, changes.remove_readable, "read"),
        writable=_patterns(before.writable, changes.add_writable, changes.remove_writable, "write"),
        models=_models(before.models, changes),
        revoked_peers=peers,
        revoked_clients=clients,
        revoked_versions=versions,
        limits=_limits(before.limits, changes.limits),
    )
    encode_whitelist(after)
    return after


def _version(highest: int, revoked: Collection[int]) -> int:
    version = highest + 1
    while version in revoked:
        version += 1
    return version


def _ops(before: Mapping[str, int], changes: Changes) -> dict[str, int]:
    ops = dict(before)
    for name in changes.remove_ops:
        if ops.pop(name, None) is None:
            raise _not_there("the op", name, before, "is not on the whitelist")
    for name in changes.add_ops:
        if name not in OPS:
            raise _not_there("the op", name, OPS, "is not in this release")
        ops[name] = OPS[name].version
    return ops


def _patterns(
    before: Sequence[str], add: Sequence[str], remove: Sequence[str], what: str
) -> tuple[str, ...]:
    for one in remove:
        if one not in before:
            raise _not_there(f"the {what} pattern", one, before, "is not on the whitelist")
    return tuple(sorted({*before, *add} - set(remove)))


def _models(before: Mapping[ModelId, str] | None, changes: Changes) -> dict[ModelId, str] | None:
    if changes.every_model:
        if changes.add_models or changes.remove_models:
            raise BadChange("either every model is allowed, or some; leave one of both out")
        return None
    if before is None and changes.remove_models:
        raise BadChange(
            "every model is allowed, so none can be taken away; name those that stay with "
            "--add-model"
        )
    if before is None and not changes.add_models:
        return None
    models = dict(before or {})
    for named in changes.remove_models:
        found = [one for one, name in models.items() if named in (one, name)]
        if not found:
            known = [*models, *models.values()]
            raise _not_there("the model", named, known, "is not on the whitelist")
        for one in found:
            del models[one]
    return models | dict(changes.add_models)


def _limits(before: Limits, changes: Sequence[str]) -> Limits:
    numbers = limits_by_name(before)
    for one in changes:
        name, equals, value = one.partition("=")
        if name not in LIMIT_NAMES:
            raise _not_there("the limit", name, LIMIT_NAMES, "does not exist")
        digits = value.replace("_", "")
        if not equals or not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
            raise BadChange(f"got the limit {one[:80]!r}, wanted a whole number: {name}=60")
        numbers[name] = int(digits)
    return Limits(**numbers)


def _revoked(
    before: Iterable[PeerId], add: Sequence[str], restore: Sequence[str]
) -> frozenset[PeerId]:
    return (frozenset(before) | {PeerId(one) for one in add}) - {PeerId(one) for one in restore}


def _not_there(what: str, name: str, known: Iterable[str], why: str) -> BadChange:
    near = difflib.get_close_matches(name[:64], list(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `glasshive whitelist show`"
    return BadChange(f"{what} {name[:80]!r} {why}; {hint}")
