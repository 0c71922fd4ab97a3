"""What `glasshive status` says of a swarm: its models, who serves which blocks, what is missing.

A trace runs over peers of one kind (dtype, quantisation, attention), so each kind is told for
itself. A model's own `peers_per_block`, `missing_blocks` and `complete` are those of the kind that
lacks least.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glasshive.client.coverage import Kind, by_kind, serve_command, spans_to_add
from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span

_COLUMNS = ("blocks", "tokens/s", "load", "hardware", "peer")
_NUMBERS = ("tokens/s", "load")
_BAR = " ▁▂▃▄▅▆▇█"
_BAR_CHARACTERS = 64


def report_of(swarm: str, records: Sequence[PeerRecord], now_seconds: float) -> dict[str, Any]:
    """The report as plain data: what `--json` prints."""
    models: dict[str, list[PeerRecord]] = {}
    for record in records:
        models.setdefault(record.model, []).append(record)
    return {
        "swarm": swarm,
        "peers": len({record.peer_id for record in records}),
        "models": [_model(of_model, now_seconds) for _, of_model in sorted(models.items())],
    }


def print_report(report: dict[str, Any], console: Console, where: Sequence[str] = ()) -> None:
    """The report for people: for each model its kinds, each with a table of its peers.

    `where` are the arguments that say which swarm, for the commands that fill holes.
    """
    if not report["models"]:
        command = shlex.join(["glasshive", "serve", "MODEL", *where])
        console.print(
            f"nobody serves a model in the swarm [bold]{escape(report['swarm'])}[/] yet; to serve "
            "one from here, run\n"
            f"  {escape(command)}\n"
            "where MODEL is a model's folder, or the name of one that was fetched; "
            "with --blocks A:B only some of its blocks",
            soft_wrap=True,
            highlight=False,
        )
    for model in report["models"]:
        console.print(
            f"[bold]{escape(model['name'])}[/]  {model['n_blocks']} blocks  "
            f"[dim]{model['id'][:16]}[/]",
            soft_wrap=True,
        )
        for kind in model["kinds"]:
            _print_kind(model, kind, console, where)


def _print_kind(
    model: dict[str, Any], kind: dict[str, Any], console: Console, where: Sequence[str]
) -> None:
    names = Kind(kind["dtype"], kind["quantisation"], kind["attention"])
    missing = ", ".join(kind["missing_blocks"])
    if kind["complete"]:
        state = "[green]every block is served[/]"
    elif missing:
        state = f"[red]blocks {missing} are missing[/]"
    else:
        state = "[red]every block is served, but no spans fit end to start[/]"
    console.print(f"\n{escape(str(names))}: {state}", soft_wrap=True)
    console.print(coverage_bar(kind["peers_per_block"]), highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _COLUMNS:
        justify: Literal["left", "right"] = "right" if heading in _NUMBERS else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    for peer in model["served_by"]:
        if (peer["dtype"], peer["quantisation"], peer["attention"]) == names:
            table.add_row(
                f"{peer['start']}:{peer['end']}",
                f"{peer['tokens_per_second']:,.0f}",
                f"{peer['load']:.0%}",
                escape(peer["backend"]),
                f"…{peer['peer_id'][-8:]}",
            )
    console.print(table)
    if kind["spans_to_add"]:
        console.print("to complete it:")
        for span in kind["spans_to_add"]:
            first, _, end = span.partition(":")
            command = serve_command(model["name"], Span(int(first), int(end)), names, where)
            console.print(f"  {escape(command)}", soft_wrap=True, highlight=False)
        console.print()


def coverage_bar(peers_per_block: Sequence[int]) -> str:
    """A character a block: taller, the more peers serve it; a dot where nobody does.

    Of a model of many blocks a character is several neighbours, and shows the least served.
    """
    group = -(-len(peers_per_block) // _BAR_CHARACTERS) or 1
    least = [min(peers_per_block[at : at + group]) for at in range(0, len(peers_per_block), group)]
    return "".join(_BAR[min(count + 2, 8)] if count else "·" for count in least)


def _model(records: Sequence[PeerRecord], now_seconds: float) -> dict[str, Any]:
    n_blocks = records[0].n_blocks
    kinds = [_kind(kind, mine, n_blocks) for kind, mine in by_kind(records).items()]
    best = min(kinds, key=lambda one: (_blocks(one["spans_to_add"]), -sum(one["peers_per_block"])))
    return {
        "name": records[0].model_name,
        "id": records[0].model,
        "n_blocks": n_blocks,
        "complete": best["complete"],
        "peers_per_block": best["peers_per_block"],
        "missing_blocks": best["missing_blocks"],
        "kinds": kinds,
        "served_by": [
            {
                "peer_id": one.peer_id,
                "start": one.start,
                "end": one.end,
                "dtype": one.dtype,
                "quantisation": one.quantisation,
                "attention": one.attention,
                "backend": one.backend,
                "tokens_per_second": one.throughput_tokens_per_second,
                "pass_seconds": one.pass_seconds,
                "load": one.load,
                "addresses": list(one.addresses),
                "software_version": one.software_version,
                "expires_in_seconds": round(one.expires_at_seconds - now_seconds, 1),
            }
            for one in sorted(records, key=lambda one: (one.start, one.end, one.peer_id))
        ],
    }


def _kind(kind: Kind, records: Sequence[PeerRecord], n_blocks: int) -> dict[str, Any]:
    counts = [sum(one.start <= block < one.end for one in records) for block in range(n_blocks)]
    to_add = [str(span) for span in spans_to_add(records, n_blocks)]
    return {
        **kind._asdict(),
        "complete": not to_add,
        "peers_per_block": counts,
        "missing_blocks": missing_ranges(counts),
        "spans_to_add": to_add,
    }


def _blocks(spans: Sequence[str]) -> int:
    bounds = [span.partition(":") for span in spans]
    return sum(int(end) - int(first) for first, _, end in bounds)


def missing_ranges(peers_per_block: Sequence[int]) -> list[str]:
    """The blocks that nobody serves, as `first:end`."""
    ranges: list[str] = []
    first: int | None = None
    for block, count in enumerate([*peers_per_block, 1]):
        if count == 0 and first is None:
            first = block
        elif count and first is not None:
            ranges.append(f"{first}:{block}")
            first = None
    return ranges
