"""What `glasshive whitelist show` says: what others can and cannot run by a whitelist, and by whom.

It is the whitelist's own word. A host may narrow it, and what this release lacks runs nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glasshive.graph.ops import OPS
from glasshive.security.policy import Policy, counted
from glasshive.security.whitelist import Whitelist, limits_by_name
from glasshive.trust_words import moment

_LIMITS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "graph_bytes": ("bytes", "one graph on the wire"),
        "nodes": ("nodes", "of one graph"),
        "const_bytes": ("bytes", "all constants of one graph"),
        "peak_bytes": ("bytes", "inputs, live values and saves of one graph at once"),
        "flops": ("FLOPs", "of one graph"),
        "seconds": ("seconds", "of the host's time, for one graph"),
        "saved_bytes": ("bytes", "sent back for one graph"),
        "steps": ("steps", "forward passes of one generation"),
        "batch_rows": ("rows", "of one batch"),
        "context_tokens": ("tokens", "of one row"),
        "traces_per_client": ("traces", "of one client at a time"),
        "generations_per_client": ("generations", "of one client at a time"),
    }
)
_UNITS: Final = ("GiB", "MiB", "KiB")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a whitelist stands: in what state, and who signed it, in words and by key."""

    state: str
    in_force: bool
    signers: tuple[str, ...]
    signatures: str


def report_of(whitelist: Whitelist, standing: Standing, now_seconds: float) -> dict[str, Any]:
    """The report as plain data: what `--json` prints."""
    here = frozenset(
        name
        for name, version in whitelist.ops.items()
        if name in OPS and OPS[name].version == version
    )
    return {
        "swarm": whitelist.swarm,
        "version": whitelist.version,
        "state": standing.state,
        "in_force": standing.in_force,
        "signers": list(standing.signers),
        "signatures": standing.signatures,
        "issued": moment(whitelist.issued_seconds),
        "expires": moment(whitelist.expires_seconds),
        "expires_in_seconds": int(whitelist.expires_seconds - now_seconds),
        "min_protocol": whitelist.min_protocol,
        "ops": dict(sorted(whitelist.ops.items())),
        "ops_refused": sorted(OPS.keys() - here),
        "ops_of_other_releases": sorted(whitelist.ops.keys() - here),
        "read": list(whitelist.readable),
        "write": list(whitelist.writable),
        "models": "*" if whitelist.models is None else dict(sorted(whitelist.models.items())),
        "limits": {
            name: {"value": value, "unit": _LIMITS[name][0]}
            for name, value in limits_by_name(whitelist.limits).items()
        },
        "revoked": {
            "hosts": sorted(whitelist.revoked_peers),
            "clients": sorted(whitelist.revoked_clients),
            "versions": sorted(whitelist.revoked_versions),
        },
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The report for people."""

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    colour = "green" if report["in_force"] else "yellow"
    line(
        f"[bold]whitelist {report['version']} of the swarm {escape(repr(report['swarm']))}[/]: "
        f"[{colour}]{escape(report['state'])}[/]"
    )
    line(f"signed by: {escape(', '.join(report['signers']) or 'nobody')}")
    line(f"  {escape(report['signatures'])}")
    days = round(report["expires_in_seconds"] / 86_400)
    left = f"{counted(days, 'day')} left" if report["expires_in_seconds"] > 0 else "that is past"
    line(f"issued {report['issued']}, ends {report['expires']} ({left})")
    line(f"hosts speak protocol {report['min_protocol']} or newer\n")
    line("[bold]Others can run[/] ops, by what they cost:")
    _print_ops(report, console)
    refused = report["ops_refused"]
    if refused:
        count = f"{counted(len(refused), 'op')} of this release: {', '.join(refused)}; nor"
        line(f"[bold]They can't run[/] {escape(count)} any other code.")
    else:
        line("[bold]They can't run[/] any other code.")
    if report["ops_of_other_releases"]:
        others = ", ".join(report["ops_of_other_releases"])
        line(f"Allowed, and not in this release: {escape(others)}.")
    line(
        "\nmodules that may be read and called, and whose weights may be fetched: "
        f"{escape(_modules(report['read']))}"
    )
    line(f"modules that may be written: {escape(_modules(report['write']))}")
    models = report["models"]
    if models == "*":
        line("models: every one that a host serves")
    elif not models:
        line("models: none")
    else:
        line("models:")
        for one, name in models.items():
            line(f"  {escape(name)}  {one}")
    console.print()
    _print_limits(report, console)
    for what, names in report["revoked"].items():
        line(f"revoked {what}: {', '.join(map(str, names)) or 'none'}")
    floor = Policy.floor()
    line(
        f"\nWhen it ends, hosts fall to the floor: {', '.join(sorted(floor.ops))}; reads, calls "
        "and weights, no writes; "
        f"{floor.limits.nodes} nodes, {floor.limits.seconds} seconds."
    )


def _print_ops(report: Mapping[str, Any], console: Console) -> None:
    groups: dict[str, list[str]] = {}
    for name in report["ops"]:
        if name not in report["ops_of_other_releases"]:
            groups.setdefault(OPS[name].cost, []).append(name)
    if not groups:
        console.print("  none")
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for cost, names in sorted(groups.items()):
        table.add_row(f"  {cost}", str(len(names)), ", ".join(names))
    console.print(table)


def _print_limits(report: Mapping[str, Any], console: Console) -> None:
    table = Table("limit", "at most", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = "right"
    for name, limit in report["limits"].items():
        table.add_row(name, in_units(limit["value"], limit["unit"]), _LIMITS[name][1])
    console.print(table)


def in_units(value: int, unit: str) -> str:
    """A limit's number with its unit; bytes in the largest unit that divides them."""
    if unit == "bytes":
        for power, name in zip((30, 20, 10), _UNITS, strict=True):
            if value and value % (1 << power) == 0:
                return f"{value >> power:,} {name}"
    return f"{value:,} {unit}"


def _modules(patterns: Sequence[str]) -> str:
    return "every one" if list(patterns) == ["**"] else ", ".join(patterns) or "none"
