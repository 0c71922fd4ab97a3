"""`glasshive demo`: three experiments on a real model, split over three peers on this machine.

Fetches SmolLM2-135M-Instruct once, starts a bootstrap and three hosts as processes of their own,
runs the experiments through the public interface, compares each with plain Hugging Face on the same
machine, and says which peer did what.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from glasshive.models import FetchProgress, fetch_smollm2
from glasshive.terminal import Bytes

SPANS = ((0, 10), (10, 20), (20, 30))


def run_demo(out: Path, *, spans: Sequence[tuple[int, int]] = SPANS) -> int:
    """Run the demo and write its pictures into `out`; 0 if every result equals the plain one."""
    console = Console()
    began = time.perf_counter()
    console.rule("[bold]glasshive demo")
    folder = _fetch(console)
    out.mkdir(parents=True, exist_ok=True)

    # Heavy imports only now: the first lines are on the screen before torch is.
    import glasshive
    from glasshive import demo_experiments, demo_oracle
    from glasshive.demo_pictures import logit_lens_png, patching_png
    from glasshive.testing import LocalSwarm

    hosts = f"{len(spans)} {'host' if len(spans) == 1 else 'hosts'}"
    with contextlib.ExitStack() as stack:
        with console.status(f"starting a bootstrap and {hosts} as processes on this machine"):
            hive = stack.enter_context(LocalSwarm(folder, spans=list(spans)))
        swarm = stack.enter_context(glasshive.connect(hive.config))
        _print_peers(console, swarm.records())
        model = swarm.model(folder.name)
        lens = _timed(console, "logit lens", lambda: demo_experiments.logit_lens(model))
        steering = _timed(console, "steering", lambda: demo_experiments.steering(model))
        patching = _run_patching(console, model)

    with console.status("running the same on plain Hugging Face, with torch hooks"):
        plain_model, tokenizer = demo_oracle.load(folder)
        plain = (
            demo_oracle.logit_lens(plain_model, tokenizer),
            demo_oracle.steering(plain_model, tokenizer),
            demo_oracle.activation_patching(plain_model, tokenizer),
        )
    ran = (lens, steering, patching)
    logit_lens_png(lens.result, out / "logit_lens.png")
    patching_png(patching.result, out / "activation_patching.png")

    _print_lens(console, lens.result)
    _print_patching(console, patching.result)
    _print_steering(console, steering.result)
    names = ("logit lens", "steering", "activation patching")
    differences = [
        mine.result.largest_difference(its) for mine, its in zip(ran, plain, strict=True)
    ]
    _print_checks(console, names, ran, differences)
    _print_traffic(console, names, ran)
    console.print(
        f"pictures: {out / 'logit_lens.png'}, {out / 'activation_patching.png'}", soft_wrap=True
    )
    console.print(f"done in {time.perf_counter() - began:.0f} s")
    if any(difference != 0.0 for difference in differences):
        console.print("[bold red]a result differs from plain Hugging Face on this machine")
        return 1
    return 0


def _fetch(console: Console) -> Path:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Bytes(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(now: FetchProgress) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = progress.add_task(now.stage, total=None)
            total = now.total_bytes or None
            progress.update(tasks[now.stage], completed=now.done_bytes, total=total)

        folder = fetch_smollm2(show)
    console.print(f"model: {folder.name} (30 blocks, fp32) in {folder}", soft_wrap=True)
    return folder


def _timed(console: Console, name: str, run: Callable[[], Any]) -> Any:
    with console.status(f"{name} over the peers"):
        began = time.perf_counter()
        ran = run()
    console.print(f"{name}: {time.perf_counter() - began:.2f} s")
    return ran


def _run_patching(console: Console, model: Any) -> Any:
    from glasshive import demo_experiments

    began = time.perf_counter()
    with Progress(
        TextColumn("activation patching"),
        BarColumn(),
        TextColumn("{task.fields[passes]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None, passes="")

        def show(done: int, total: int) -> None:
            passes = f"pass {done + 1} of {total}" if done < total else f"{total} passes"
            progress.update(task, completed=done, total=total, passes=passes)

        ran = demo_experiments.activation_patching(model, on_pass=show)
    seconds = time.perf_counter() - began
    console.print(
        f"activation patching: {seconds:.2f} s for {sum(ran.rows)} rows in {len(ran.rows)} passes"
    )
    return ran


def _table(*columns: str, gap: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap), pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _print_peers(console: Console, records: Sequence[Any]) -> None:
    console.print("\n[bold]the swarm[/], as its directory tells it")
    table = _table("blocks", "dtype", "attention", "tokens/s", "peer")
    for one in sorted(records, key=lambda one: (one.start, one.end)):
        speed = f"{one.throughput_tokens_per_second:.0f}"
        table.add_row(
            f"{one.start}:{one.end}", one.dtype, one.attention, speed, f"…{one.peer_id[-12:]}"
        )
    console.print(table)


def _print_lens(console: Console, result: Any) -> None:
    console.print(
        f"[bold]logit lens[/]: what layers would say after each token of “{result.spec.prompt}”"
    )
    table = _table("layer", *(token.strip() or repr(token) for token in result.tokens))
    layers = len(result.top_tokens)
    for layer in sorted({*range(0, layers - 6, 4), *range(layers - 6, layers)}):
        cells = []
        said = zip(result.top_tokens[layer], result.probabilities[layer].tolist(), strict=True)
        for token, probability in said:
            word = _short(token)
            cells.append(f"[bold green]{word}[/]" if probability >= 0.5 else f"[dim]{word}[/]")
        table.add_row(str(layer), *cells)
    console.print(table)


def _print_patching(console: Console, result: Any) -> None:
    spec = result.spec
    console.print(
        "[bold]activation patching[/]: per cent of the clean answer that one (layer, token) of the "
        f"clean run brings back\n  clean: {spec.clean} →{spec.answer}\n"
        f"  corrupted: {spec.corrupted} →{spec.distractor}"
    )
    table = _table("layer", *(_short(token, 4) for token in result.tokens), gap=0)
    for layer in range(0, len(result.restored), 3):
        table.add_row(str(layer), *(_per_cent(one) for one in result.restored[layer].tolist()))
    console.print(table)


def _per_cent(share: float) -> str:
    text = f"{100 * share:.0f}"
    if text in ("0", "-0"):
        return "[dim]·[/]"
    return f"[bold blue]{text}[/]" if share > 0.5 else text


def _print_steering(console: Console, result: Any) -> None:
    spec = result.spec
    console.print(
        f"[bold]steering[/]: “{spec.prompt} …”\n  layer {spec.layer} moved from “{spec.away}” "
        f"towards “{spec.toward}”"
    )
    table = _table("before", "p", "after", "p")
    for (before, p), (after, q) in zip(result.plain_top, result.steered_top, strict=True):
        table.add_row(_short(before), f"{p:.3f}", _short(after), f"{q:.3f}")
    console.print(table)


def _print_checks(
    console: Console, names: Sequence[str], ran: Sequence[Any], differences: Sequence[float]
) -> None:
    console.print("[bold]against plain Hugging Face[/] with torch hooks, on this machine")
    table = _table("experiment", "passes", "rows", "largest difference", "")
    for name, one, difference in zip(names, ran, differences, strict=True):
        verdict = "[green]bit-equal[/]" if difference == 0.0 else "[red]differs[/]"
        table.add_row(name, str(len(one.rows)), str(sum(one.rows)), f"{difference:g}", verdict)
    console.print(table)


def _print_traffic(console: Console, names: Sequence[str], ran: Sequence[Any]) -> None:
    console.print("[bold]which peer did what[/], and the bytes that travelled")
    table = _table("experiment", "blocks", "compute s", "hidden on", "carried on", "saved back")
    totals = []
    for name, one in zip(names, ran, strict=True):
        total = 0
        for place in range(len(one.traces[0].hops)):
            hops = [trace.hops[place] for trace in one.traces]
            hidden = sum(hop.hidden_bytes for hop in hops)
            carried = sum(hop.carried_bytes for hop in hops)
            saved = sum(hop.saved_bytes for hop in hops)
            total += hidden + carried + saved
            table.add_row(
                name if place == 0 else "",
                hops[0].blocks,
                f"{sum(hop.compute_seconds for hop in hops):.2f}",
                amount(hidden),
                amount(carried),
                amount(saved),
            )
        totals.append(f"{name} [bold]{amount(total)}[/] (Petals' way {amount(petals_bytes(one))})")
        table.add_section()
    console.print(table)
    console.print(f"in all: {', '.join(totals)}")
    console.print(
        "[dim]Petals' way: peers there run blocks and nothing else, so hidden states go to the "
        "client and back at every block that the experiment touches[/]"
    )


def _short(token: str, most: int = 12) -> str:
    word = token.strip() or repr(token)
    return escape(word if len(word) <= most else word[: most - 1] + "…")


def petals_bytes(ran: Any) -> int:
    """What the same forwards would move if every touched block's states went through the client.

    There a client sends hidden states to a peer and takes them back at the end of its span, and at
    every block between which it wants to see or change them; each way is rows x tokens x width.
    """
    width_bytes = 576 * 4
    ends = {int(hop.blocks.split(":")[1]) for hop in ran.traces[0].hops}
    crossings = 2 * len(ends | {block + 1 for block in ran.touched_blocks})
    return sum(rows * ran.tokens * width_bytes * crossings for rows in ran.rows)


def amount(size_bytes: int) -> str:
    """Bytes for people, in powers of a thousand."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
