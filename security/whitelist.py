"""The whitelist: what the hosts of a swarm may run, as its signers say it.

Rules:

1. A whitelist can only narrow what this release can do: an op means what the release's code says.
2. Every field is there once and known; every number is whole; every list has a cap, below.
3. It has one encoding, and bytes that are not this encoding are refused, so what was signed is
   what is meant. Who signed it is no matter of this module (trust_root.py).
4. Its text is TOML with the same fields, for people to write and read; a text gives one whitelist.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

from glasshive.security.errors import BadPeerId, BadWhitelist, MalformedData
from glasshive.security.keys import PeerId, public_key_of
from glasshive.security.manifest import MAX_NAME_CHARS, ModelId
from glasshive.security.module_patterns import check_pattern
from glasshive.security.plain import decode_plain, encode_plain

__all__ = [
    "Limits",
    "Whitelist",
    "decode_whitelist",
    "encode_whitelist",
    "whitelist_from_text",
    "whitelist_to_text",
]

FORMAT: Final = 1

# All caps.
MAX_BODY_BYTES: Final = 256 * 1024
MAX_ELEMENTS: Final = 16_384
MAX_DEPTH: Final = 3
MAX_OPS: Final = 1024
MAX_PATTERNS: Final = 64
MAX_MODELS: Final = 1024
MAX_REVOKED: Final = 1024
MAX_SWARM_CHARS: Final = 64
MAX_VERSION: Final = 2**31 - 1
MAX_LIMIT: Final = 2**53 - 1
MAX_LIFETIME_SECONDS: Final = 366 * 86_400
MAX_TIME_SECONDS: Final = 253_402_300_799  # the end of the year 9999
FUTURE_SECONDS: Final = 600  # how far in a clock's future a whitelist may be issued

_OP_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,63}")
MANIFEST_ID: Final = re.compile(r"[0-9a-f]{64}")
_ALL: Final = "*"


@dataclass(frozen=True, slots=True)
class Limits:
    """One whole number for each thing that a client can ask of a host. 0 allows none of it."""

    graph_bytes: int
    nodes: int
    const_bytes: int  # all constants of one graph
    peak_bytes: int  # inputs, live values and saves of one graph at once
    flops: int
    seconds: int  # of the host's time, for one graph
    saved_bytes: int
    steps: int  # forward passes of one generation
    batch_rows: int
    context_tokens: int
    traces_per_client: int
    generations_per_client: int

    def narrowed(self, other: Limits) -> Limits:
        """The smaller number of each."""
        mine, theirs = limits_by_name(self), limits_by_name(other)
        return Limits(**{name: min(value, theirs[name]) for name, value in mine.items()})


LIMIT_NAMES: Final = tuple(field.name for field in fields(Limits))


def limits_by_name(limits: Limits) -> dict[str, int]:
    """The numbers under their names, in the order of the class."""
    values = (
        limits.graph_bytes, limits.nodes, limits.const_bytes, limits.peak_bytes, limits.flops,
        limits.seconds, limits.saved_bytes, limits.steps, limits.batch_rows,
        limits.context_tokens, limits.traces_per_client, limits.generations_per_client,
    )  # fmt: skip
    return dict(zip(LIMIT_NAMES, values, strict=True))


@dataclass(frozen=True, slots=True)
class Whitelist:
    """What the hosts of one swarm may run, from `issued_seconds` to `expires_seconds` (Unix time).

    `ops` gives each op's signature version; `readable` and `writable` are module patterns; `models`
    gives names by manifest id, or is None where every model is allowed. `revoked_versions` are of
    whitelists.
    """

    swarm: str
    version: int
    issued_seconds: int
    expires_seconds: int
    min_protocol: int
    ops: Mapping[str, int]
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    models: Mapping[ModelId, str] | None
    revoked_peers: frozenset[PeerId]
    revoked_clients: frozenset[PeerId]
    revoked_versions: frozenset[int]
    limits: Limits


# Bytes ------------------------------------------------------------------------------------------


def encode_whitelist(whitelist: Whitelist) -> bytes:
    """The whitelist's only encoding. Raises BadWhitelist for fields out of range."""
    tree = _tree(whitelist)
    try:
        data = encode_plain(tree)
    except MalformedData as error:
        raise BadWhitelist(f"a whitelist that can't be written: {error}") from None
    if len(data) > MAX_BODY_BYTES:
        raise BadWhitelist(f"a whitelist of {len(data)} bytes; {MAX_BODY_BYTES} are allowed")
    _whitelist(tree)
    return data


def decode_whitelist(data: bytes) -> Whitelist:
    """The whitelist in `data`. Raises BadWhitelist, whatever the bytes are."""
    try:
        tree = decode_plain(
            data, max_bytes=MAX_BODY_BYTES, max_depth=MAX_DEPTH, max_elements=MAX_ELEMENTS
        )
    except MalformedData as error:
        raise BadWhitelist(f"bytes that are no whitelist: {error}") from None
    whitelist = _whitelist(tree)
    if encode_plain(_tree(whitelist)) != data:
        raise BadWhitelist("a whitelist's bytes are not its only encoding; sign it anew")
    return whitelist


def _tree(whitelist: Whitelist) -> dict[str, object]:
    """The whitelist as it is written: fields in this order, lists and maps sorted."""
    models = whitelist.models
    return {
        "format": FORMAT,
        "swarm": whitelist.swarm,
        "version": whitelist.version,
        "issued": whitelist.issued_seconds,
        "expires": whitelist.expires_seconds,
        "min_protocol": whitelist.min_protocol,
        "read": sorted(whitelist.readable),
        "write": sorted(whitelist.writable),
        "models": _ALL if models is None else dict(sorted(models.items())),
        "ops": dict(sorted(whitelist.ops.items())),
        "revoked": {
            "peers": sorted(whitelist.revoked_peers),
            "clients": sorted(whitelist.revoked_clients),
            "versions": sorted(whitelist.revoked_versions),
        },
        "limits": limits_by_name(whitelist.limits),
    }


_FIELDS: Final = (
    "format", "swarm", "version", "issued", "expires", "min_protocol", "read", "write", "models",
    "ops", "revoked", "limits",
)  # fmt: skip


def _whitelist(tree: object) -> Whitelist:
    top = named_fields(tree, "", _FIELDS, BadWhitelist)
    if type(top["format"]) is not int or top["format"] != FORMAT:
        raise BadWhitelist(f"a whitelist of another format than {FORMAT}; update glasshive")
    swarm = top["swarm"]
    if not isinstance(swarm, str) or not 0 < len(swarm) <= MAX_SWARM_CHARS or not _plain(swarm):
        raise BadWhitelist(f"swarm is not a name of 1 to {MAX_SWARM_CHARS} characters")
    version = whole(top["version"], "version", 1, MAX_VERSION, BadWhitelist)
    issued = whole(top["issued"], "issued", 1, MAX_TIME_SECONDS, BadWhitelist)
    latest = min(issued + MAX_LIFETIME_SECONDS, MAX_TIME_SECONDS)
    if type(top["expires"]) is int and top["expires"] > latest:
        raise BadWhitelist("expires is more than 366 days after issued; sign for a shorter time")
    expires = whole(top["expires"], "expires", issued + 1, latest, BadWhitelist)
    min_protocol = whole(top["min_protocol"], "min_protocol", 1, MAX_VERSION, BadWhitelist)
    revoked = named_fields(
        top["revoked"], "revoked.", ("peers", "clients", "versions"), BadWhitelist
    )
    versions = _distinct(revoked["versions"], "revoked.versions", MAX_REVOKED)
    revoked_versions = frozenset(
        whole(one, "revoked.versions", 1, MAX_VERSION, BadWhitelist) for one in versions
    )
    if version in revoked_versions:
        raise BadWhitelist(f"revoked.versions names {version}, which is this whitelist itself")
    return Whitelist(
        swarm=swarm,
        version=version,
        issued_seconds=issued,
        expires_seconds=expires,
        min_protocol=min_protocol,
        ops=_ops(top["ops"]),
        readable=patterns(top["read"], "read", BadWhitelist),
        writable=patterns(top["write"], "write", BadWhitelist),
        models=_models(top["models"]),
        revoked_peers=peer_ids(revoked["peers"], "revoked.peers", BadWhitelist),
        revoked_clients=peer_ids(revoked["clients"], "revoked.clients", BadWhitelist),
        revoked_versions=revoked_versions,
        limits=_limits(top["limits"]),
    )


def _ops(tree: object) -> Mapping[str, int]:
    if not isinstance(tree, dict) or len(tree) > MAX_OPS:
        raise BadWhitelist(f"ops is not a table of at most {MAX_OPS} op names and versions")
    for name in tree:
        if not isinstance(name, str) or not _OP_NAME.fullmatch(name):
            raise BadWhitelist(f"ops has {name[:64]!r}, which is no op's name")
    return MappingProxyType(
        {name: whole(tree[name], f"ops.{name}", 1, MAX_VERSION, BadWhitelist) for name in tree}
    )


def _models(tree: object) -> Mapping[ModelId, str] | None:
    if tree == _ALL:
        return None
    if not isinstance(tree, dict) or len(tree) > MAX_MODELS:
        raise BadWhitelist(
            f'models is neither "*" nor a table of at most {MAX_MODELS} manifest ids and names'
        )
    for key, name in tree.items():
        if not isinstance(key, str) or not MANIFEST_ID.fullmatch(key):
            raise BadWhitelist(
                f"models has {key[:64]!r}, which is no manifest id (64 hexadecimal digits)"
            )
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not _plain(name):
            raise BadWhitelist(f"models.{key} is not a name of 1 to {MAX_NAME_CHARS} characters")
    return MappingProxyType({ModelId(key): name for key, name in tree.items()})


def _limits(tree: object) -> Limits:
    numbers = named_fields(tree, "limits.", LIMIT_NAMES, BadWhitelist)
    return Limits(
        **{
            name: whole(numbers[name], f"limits.{name}", 0, MAX_LIMIT, BadWhitelist)
            for name in LIMIT_NAMES
        }
    )


# Fields, each checked with an error that names it; a host's own file (policy.py) has some of them.

Refusal = Callable[[str], Exception]


def named_fields(
    tree: object, where: str, names: tuple[str, ...], refusal: Refusal, *, optional: bool = False
) -> dict[str, object]:
    """`tree` as a map of these fields. Raises `refusal` for an unknown or a missing one."""
    if not isinstance(tree, dict):
        raise refusal(f"{where.rstrip('.') or 'the whole'} is not a table of fields")
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(str(key)[:64], names, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else "; is glasshive up to date?"
            raise refusal(f"unknown field {where}{str(key)[:64]}{hint}")
    for name in names:
        if name not in tree and not optional:
            raise refusal(f"the field {where}{name} is missing")
    return tree


def whole(value: object, where: str, low: int, high: int, refusal: Refusal) -> int:
    """`value` if it is an int from `low` to `high`. Raises `refusal`."""
    if type(value) is not int or not low <= value <= high:
        got = str(value)[:40] if type(value) in (int, float) else f"a {type(value).__name__}"
        raise refusal(f"{where} is {got}; a whole number from {low} to {high} is wanted")
    return value


def patterns(tree: object, where: str, refusal: Refusal) -> tuple[str, ...]:
    """`tree` as module patterns, sorted. Raises `refusal`."""
    for pattern in texts(tree, where, MAX_PATTERNS, refusal):
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise refusal(f"{where} has {pattern[:64]!r}, which is no pattern: {error}") from None
    return tuple(sorted(texts(tree, where, MAX_PATTERNS, refusal)))


def peer_ids(tree: object, where: str, refusal: Refusal) -> frozenset[PeerId]:
    """`tree` as the ids of Ed25519 keys. Raises `refusal`."""
    ids = texts(tree, where, MAX_REVOKED, refusal)
    for one in ids:
        try:
            public_key_of(one)
        except BadPeerId as error:
            raise refusal(f"{where} has no peer id: {error}") from None
    return frozenset(PeerId(one) for one in ids)


def texts(tree: object, where: str, most: int, refusal: Refusal) -> list[str]:
    """`tree` as a list of different texts. Raises `refusal`."""
    if not isinstance(tree, list) or len(tree) > most:
        raise refusal(f"{where} is not a list of at most {most}")
    if not all(isinstance(one, str) for one in tree) or len(set(tree)) != len(tree):
        raise refusal(f"{where} is not a list of different texts")
    return tree


def _distinct(tree: object, where: str, most: int) -> Iterable[object]:
    if not isinstance(tree, list) or len(tree) > most:
        raise BadWhitelist(f"{where} is not a list of at most {most}")
    if len(set(map(repr, tree))) != len(tree):
        raise BadWhitelist(f"{where} has one twice")
    return tree


def _plain(text: str) -> bool:
    """Whether it can be shown on a terminal and written in a text as it is."""
    return text.isprintable()


# Text -------------------------------------------------------------------------------------------

_UNITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "const_bytes": "all constants of one graph",
        "peak_bytes": "of one graph, saves included",
        "flops": "of one graph",
        "seconds": "of the host's time, for one graph",
        "saved_bytes": "of one graph",
        "steps": "forward passes of one generation",
    }
)


def whitelist_to_text(whitelist: Whitelist) -> str:
    """The whitelist as TOML that `whitelist_from_text` reads back to an equal one."""
    models = whitelist.models
    lines = [
        f"format = {FORMAT}",
        f"swarm = {_quoted(whitelist.swarm)}",
        f"version = {whitelist.version}",
        f"issued = {_moment(whitelist.issued_seconds)}",
        f"expires = {_moment(whitelist.expires_seconds)}",
        f"min_protocol = {whitelist.min_protocol}",
        "# Modules by path: * is any one part, ** at the end any number of parts.",
        f"read = {_list(whitelist.readable)}",
        f"write = {_list(whitelist.writable)}",
    ]
    if models is None:
        lines.append(f"models = {_quoted(_ALL)}  # every model")
    lines += ["", "[limits]"]
    for name, value in limits_by_name(whitelist.limits).items():
        lines.append(f"{name} = {value}" + (f"  # {_UNITS[name]}" if name in _UNITS else ""))
    lines += [
        "",
        "[revoked]",
        f"peers = {_list(whitelist.revoked_peers)}",
        f"clients = {_list(whitelist.revoked_clients)}",
        f"versions = {sorted(whitelist.revoked_versions)}",
    ]
    if models is not None:
        lines += ["", "[models]  # manifest id = name"]
        lines += [f"{_quoted(one)} = {_quoted(name)}" for one, name in sorted(models.items())]
    lines += ["", "[ops]  # op = version of its signature"]
    lines += [f"{name} = {version}" for name, version in sorted(whitelist.ops.items())]
    return "\n".join(lines) + "\n"


def whitelist_from_text(text: str) -> Whitelist:
    """The whitelist that a TOML text says. Raises BadWhitelist, which names the field."""
    tree = read_toml(text, BadWhitelist)
    for name in ("issued", "expires"):
        if name in tree:
            tree[name] = _seconds(tree[name], name)
    return _whitelist(tree)


def read_toml(text: str, refusal: Refusal) -> dict[str, object]:
    """The tables of a TOML text. Raises `refusal` with the line."""
    if len(text) > 4 * MAX_BODY_BYTES:
        raise refusal(f"a text of {len(text)} characters; {4 * MAX_BODY_BYTES} are allowed")
    try:
        tree = tomllib.loads(text)
        _check_numbers(tree)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise refusal(f"not TOML: {error}") from None
    except ValueError:  # Python refuses to read, and to print, a number that is long enough
        raise refusal("a number has too many digits; 64 bits are the most of any") from None
    return tree


def _check_numbers(tree: object) -> None:
    """Return if every number has at most 64 bits. Raises ValueError."""
    if type(tree) is int and tree.bit_length() > 64:
        raise ValueError
    if isinstance(tree, dict | list):
        for one in tree.values() if isinstance(tree, dict) else tree:
            _check_numbers(one)


def _seconds(value: object, where: str) -> int:
    if not isinstance(value, datetime) or value.tzinfo is None or value.microsecond:
        raise BadWhitelist(
            f"{where} is not a moment in whole seconds with a zone, such as 2026-11-24T10:00:00Z"
        )
    return int(value.timestamp())


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _list(items: Iterable[str]) -> str:
    quoted = [_quoted(item) for item in sorted(items)]
    if len(quoted) <= 2:
        return f"[{', '.join(quoted)}]"
    return "[\n" + "".join(f"    {item},\n" for item in quoted) + "]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
