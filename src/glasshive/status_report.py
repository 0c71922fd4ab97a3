"""What `glasshive status` says of a swarm: its models, who serves which blocks, what is missing.

`peers_per_block` and `missing_blocks` are of the kind (dtype, quantisation, attention) that covers
the model best: a trace never mixes kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from glasshive.dht.records import PeerRecord

_NUMBERS = ("tokens/s", "load")
_BAR = " ▁▂▃▄▅▆▇█"


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


def model_tables(report: dict[str, Any]) -> Iterable[Table | Text]:
    """The report for a terminal: a table for each model."""
    if not report["models"]:
        yield Text(
            f"nobody serves a model in the swarm {report['swarm']}; "
            "`glasshive serve MODEL --blocks A:B` starts"
        )
    for model in report["models"]:
        missing = ", ".join(model["missing_blocks"])
        coverage = f"blocks {missing} are missing" if missing else "every block is served"
        table = Table(
            title=f"{escape(model['name'])}  [dim]{model['id'][:16]}[/]",
            caption=f"{coverage}  {coverage_bar(model['peers_per_block'])}",
            caption_style="red" if missing else "green",
        )
        for heading in ("blocks", "dtype", "attention", "hardware", "tokens/s", "load", "peer"):
            justify: Literal["left", "right"] = "right" if heading in _NUMBERS else "left"
            table.add_column(heading, justify=justify, no_wrap=True)
        for peer in model["served_by"]:
            table.add_row(
                f"{peer['start']}:{peer['end']}",
                peer["dtype"],
                peer["attention"],
                escape(peer["backend"]),
                f"{peer['tokens_per_second']:,.0f}",
                f"{peer['load']:.0%}",
                f"…{peer['peer_id'][-8:]}",
            )
        yield table


def coverage_bar(peers_per_block: Sequence[int]) -> str:
    """A character a block: taller, the more peers serve it; a dot where nobody does."""
    return "".join(_BAR[min(count + 2, 8)] if count else "·" for count in peers_per_block)


def _model(records: Sequence[PeerRecord], now_seconds: float) -> dict[str, Any]:
    n_blocks = records[0].n_blocks
    classes: dict[tuple[str, str, str], list[PeerRecord]] = {}
    for one in records:
        classes.setdefault((one.dtype, one.quantisation, one.attention), []).append(one)
    # A trace runs over peers of one kind, so what counts is the kind that is served best.
    counts = max(
        (_peers_per_block(of_class, n_blocks) for of_class in classes.values()),
        key=lambda counts: (sum(count > 0 for count in counts), sum(counts)),
    )
    return {
        "name": records[0].model_name,
        "id": records[0].model,
        "n_blocks": n_blocks,
        "peers_per_block": counts,
        "missing_blocks": missing_ranges(counts),
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
                "load": one.load,
                "addresses": list(one.addresses),
                "software_version": one.software_version,
                "expires_in_seconds": round(one.expires_at_seconds - now_seconds, 1),
            }
            for one in sorted(records, key=lambda one: (one.start, one.end, one.peer_id))
        ],
    }


def _peers_per_block(records: Sequence[PeerRecord], n_blocks: int) -> list[int]:
    return [sum(one.start <= block < one.end for one in records) for block in range(n_blocks)]


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
