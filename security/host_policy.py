"""A host's own policy file: what its owner lends less of than the swarm's whitelist allows.

TOML with these fields and no others, each of them optional:

    ops = ["add", "softmax"]              # of the allowed ops, only these
    deny_ops = ["linalg_svd"]             # never these
    read = ["model.layers.*.mlp"]         # of the modules that may be read, only these
    write = []
    models = ["<manifest id>"]
    refuse_peers = ["12D3KooW..."]
    refuse_clients = ["12D3KooW..."]

    [limits]                              # each at most what the whitelist says
    seconds = 60

Such a file can only narrow. What is wider in it than the whitelist counts for nothing: whitelists
come and go, and a host that was started with an op must start again when that is taken away. An op
that this release doesn't have is an error: it may be a misspelt one, which would stay allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from glasshive.graph.ops import OPS
from glasshive.security.errors import BadPolicy
from glasshive.security.keys import PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.module_patterns import covered_by
from glasshive.security.whitelist import (
    LIMIT_NAMES,
    MANIFEST_ID,
    MAX_LIMIT,
    MAX_MODELS,
    MAX_OPS,
    limits_by_name,
    named_fields,
    patterns,
    peer_ids,
    read_toml,
    texts,
    whole,
)

if TYPE_CHECKING:
    from glasshive.security.policy import Policy

__all__ = ["HostRules", "read_host_rules"]

MAX_FILE_BYTES: Final = 64 * 1024

_FIELDS: Final = (
    "ops", "deny_ops", "read", "write", "models", "refuse_peers", "refuse_clients", "limits",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostRules:
    """A host's own file: None where it says nothing, and the whitelist alone counts."""

    ops: frozenset[str] | None = None
    denied_ops: frozenset[str] = frozenset()
    readable: tuple[str, ...] | None = None
    writable: tuple[str, ...] | None = None
    models: frozenset[ModelId] | None = None
    refused_peers: frozenset[PeerId] = frozenset()
    refused_clients: frozenset[PeerId] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> HostRules:
        """The rules that a TOML text says. Raises BadPolicy, which names the field."""
        tree = named_fields(read_toml(text, BadPolicy), "", _FIELDS, BadPolicy, optional=True)
        limits = named_fields(
            tree.get("limits", {}), "limits.", LIMIT_NAMES, BadPolicy, optional=True
        )
        ops, models = tree.get("ops"), tree.get("models")
        read, write = tree.get("read"), tree.get("write")
        return cls(
            ops=None if ops is None else _ops(ops, "ops"),
            denied_ops=_ops(tree.get("deny_ops", []), "deny_ops"),
            readable=None if read is None else patterns(read, "read", BadPolicy),
            writable=None if write is None else patterns(write, "write", BadPolicy),
            models=None if models is None else _models(models),
            refused_peers=peer_ids(tree.get("refuse_peers", []), "refuse_peers", BadPolicy),
            refused_clients=peer_ids(tree.get("refuse_clients", []), "refuse_clients", BadPolicy),
            limits=MappingProxyType(
                {
                    name: whole(value, f"limits.{name}", 0, MAX_LIMIT, BadPolicy)
                    for name, value in limits.items()
                }
            ),
        )

    def check_narrows(self, policy: Policy) -> None:
        """Return if nothing here is wider than `policy`. Raises BadPolicy, which names it."""
        wider = next(self._wider(policy), None)
        if wider is not None:
            raise BadPolicy(
                f"the host's own file allows {wider} {policy.source} does not; it can only narrow, "
                "so take that out of the file"
            )

    def _wider(self, policy: Policy) -> Iterator[str]:
        for op in sorted((self.ops or frozenset()) - policy.ops):
            yield f"the op {op[:64]!r}, which"
        for pattern in self.readable or ():
            if not covered_by(pattern, policy.readable):
                yield f"reading {pattern!r}, which"
        for pattern in self.writable or ():
            if not covered_by(pattern, policy.writable):
                yield f"writing {pattern!r}, which"
        for model in sorted(self.models or frozenset()):
            if not policy.allows_model(model):
                yield f"the model {model[:64]!r}, which"
        allowed = limits_by_name(policy.limits)
        for name, value in self.limits.items():
            if value > allowed[name]:
                yield f"limits.{name} = {value}, more than {allowed[name]}, which"


def read_host_rules(path: Path) -> HostRules:
    """The rules in the file at `path`. Raises BadPolicy, which names the file and the field."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadPolicy(f"longer than the {MAX_FILE_BYTES} bytes that are allowed")
        return HostRules.from_text(data.decode("utf-8"))
    except OSError as error:
        raise BadPolicy(
            f"can't read the host's own file {path}: {error.strerror or error}; check `policy` in "
            "hive.toml or GLASSHIVE_POLICY"
        ) from None
    except UnicodeDecodeError as error:
        raise BadPolicy(f"the host's own file {path}: no UTF-8 text: {error.reason}") from None
    except BadPolicy as error:
        raise BadPolicy(f"the host's own file {path}: {error}") from None


def _ops(tree: object, where: str) -> frozenset[str]:
    names = texts(tree, where, MAX_OPS, BadPolicy)
    for name in names:
        if name not in OPS:
            near = difflib.get_close_matches(name[:64], OPS, n=1)
            hint = f"did you mean {near[0]}?" if near else "take it out"
            raise BadPolicy(f"{where} has {name[:64]!r}, which is no op of this release; {hint}")
    return frozenset(names)


def _models(tree: object) -> frozenset[ModelId]:
    ids = texts(tree, "models", MAX_MODELS, BadPolicy)
    for one in ids:
        if not MANIFEST_ID.fullmatch(one):
            raise BadPolicy(
                f"models has {one[:64]!r}, which is no manifest id (64 hexadecimal digits); "
                "`glasshive manifest MODEL` prints it"
            )
    return frozenset(map(ModelId, ids))
