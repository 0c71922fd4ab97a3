"""`glasshive demo`: three experiments on a real model, split over three peers on this machine.

Fetches SmolLM2-135M-Instruct once, starts a bootstrap and three hosts as processes of their own,
runs the experiments through the public interface, compares each with plain Hugging Face on the same
machine, and says which peer did what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from glasshive.models import FetchProgress, fetch_smollm2

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

    with console.status("starting a bootstrap and three hosts as processes on this machine"):
        swarm_process = LocalSwarm(folder, spans=list(spans))
        swarm_process.__enter__()
    try:
        with glasshive.connect(swarm_process.config) as swarm:
            console.print(_peers_table(swarm.records()))
            with console.status("fetching configuration and tokenizer from a peer"):
                model = swarm.model(folder.name)
            lens = _timed(console, "logit lens", lambda: demo_experiments.logit_lens(model))
            steering = _timed(console, "steering", lambda: demo_experiments.steering(model))
            patching = _run_patching(console, model)
    finally:
        with console.status("stopping the hosts"):
            swarm_process.__exit__(None, None, None)

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

    console.print(_lens_table(lens.result))
    console.print(_patching_table(patching.result))
    console.print(_steering_table(steering.result))
    names = ("logit lens", "steering", "activation patching")
    differences = [
        mine.result.largest_difference(its) for mine, its in zip(ran, plain, strict=True)
    ]
    console.print(_checks_table(names, ran, differences))
    console.print(_traffic_table(names, ran))
    console.print(f"pictures: {out / 'logit_lens.png'}, {out / 'activation_patching.png'}")
    console.print(f"done in {time.perf_counter() - began:.0f} s")
    if any(difference != 0.0 for difference in differences):
        console.print("[bold red]a result differs from plain Hugging Face on this machine")
        return 1
    return 0


def _fetch(console: Console) -> Path:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(now: FetchProgress) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = progress.add_task(now.stage, total=None)
            total = now.total_bytes or None
            progress.update(tasks[now.stage], completed=now.done_bytes, total=total)

        folder = fetch_smollm2(show)
    console.print(f"model: {folder.name} (30 blocks, fp32) in {folder}")
    return folder


def _timed(console: Console, name: str, run: Callable[[], Any]) -> Any:
    with console.status(f"{name} over three peers"):
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
        TextColumn("pass {task.completed} of {task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)
        ran = demo_experiments.activation_patching(
            model, on_pass=lambda done, total: progress.update(task, completed=done, total=total)
        )
    seconds = time.perf_counter() - began
    console.print(
        f"activation patching: {seconds:.2f} s for {sum(ran.rows)} rows in {len(ran.rows)} passes"
    )
    return ran


def _peers_table(records: Sequence[Any]) -> Table:
    table = Table(title="the swarm, as its directory tells it", title_justify="left")
    for name in ("blocks", "dtype", "attention", "tokens/s", "peer"):
        table.add_column(name)
    for one in sorted(records, key=lambda one: (one.start, one.end)):
        table.add_row(
            f"{one.start}:{one.end}",
            one.dtype,
            one.attention,
            f"{one.throughput_tokens_per_second:.0f}",
            one.peer_id,
        )
    return table


def _lens_table(result: Any) -> Table:
    title = f"logit lens: what each layer would say after each token of “{result.spec.prompt}”"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for token in result.tokens:
        table.add_column(token.strip() or repr(token), overflow="ellipsis", max_width=13)
    layers = len(result.top_tokens)
    shown = sorted({*range(0, layers, 4), *range(layers - 6, layers)})
    for layer in shown:
        cells = [
            f"[bold]{token.strip()}[/] {probability:.2f}" if probability >= 0.5 else token.strip()
            for token, probability in zip(
                map(_escaped, result.top_tokens[layer]),
                result.probabilities[layer].tolist(),
                strict=True,
            )
        ]
        table.add_row(str(layer), *cells)
    return table


def _patching_table(result: Any) -> Table:
    spec = result.spec
    title = (
        f"activation patching: share of the clean answer{spec.answer} that one clean (layer, token)"
        f" brings back\nclean: {spec.clean}\ncorrupted: {spec.corrupted}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for token in result.tokens:
        table.add_column(token.strip() or repr(token), justify="right")
    for layer in range(0, len(result.restored), 3):
        row = result.restored[layer].tolist()
        table.add_row(str(layer), *(_share(value) for value in row))
    return table


def _share(value: float) -> str:
    text = f"{value:.2f}"
    if abs(value) < 0.005:
        return "[dim]·[/]"
    return f"[bold blue]{text}[/]" if value > 0.5 else text


def _steering_table(result: Any) -> Table:
    spec = result.spec
    title = (
        f"steering: “{spec.prompt} …” with layer {spec.layer} moved from “{spec.away}” "
        f"towards “{spec.toward}”"
    )
    table = Table(title=title, title_justify="left")
    for name in ("before", "p", "after", "p"):
        table.add_column(name)
    for (before, p), (after, q) in zip(result.plain_top, result.steered_top, strict=True):
        table.add_row(_escaped(before.strip()), f"{p:.3f}", _escaped(after.strip()), f"{q:.3f}")
    return table


def _checks_table(names: Sequence[str], ran: Sequence[Any], differences: Sequence[float]) -> Table:
    table = Table(title="against plain Hugging Face with torch hooks", title_justify="left")
    for name in ("experiment", "passes", "rows", "largest difference", ""):
        table.add_column(name, justify="left" if name in ("experiment", "") else "right")
    for name, one, difference in zip(names, ran, differences, strict=True):
        verdict = "[green]bit-equal[/]" if difference == 0.0 else "[red]differs[/]"
        table.add_row(name, str(len(one.rows)), str(sum(one.rows)), f"{difference:g}", verdict)
    return table


def _traffic_table(names: Sequence[str], ran: Sequence[Any]) -> Table:
    table = Table(title="which peer did what, and the bytes that travelled", title_justify="left")
    for name in ("experiment", "blocks", "compute s", "hidden on", "carried on", "saved back"):
        table.add_column(name, justify="left" if name == "experiment" else "right")
    for name, one in zip(names, ran, strict=True):
        total = 0
        for place in range(len(one.traces[0].hops)):
            hops = [trace.hops[place] for trace in one.traces]
            _, span, *_ = hops[0]
            seconds, hidden, carried, saved = (sum(hop[i] for hop in hops) for i in (2, 3, 4, 5))
            total += hidden + carried + saved
            table.add_row(
                name if place == 0 else "",
                span,
                f"{seconds:.2f}",
                amount(hidden),
                amount(carried),
                amount(saved),
            )
        petals = petals_bytes(one)
        table.add_row(
            "",
            "[bold]all[/]",
            "",
            "",
            "",
            f"[bold]{amount(total)}[/]\n[dim]Petals' way: {amount(petals)}[/]",
            end_section=True,
        )
    table.caption = (
        "Petals' way: hidden states go to the client and back at every block that the experiment "
        "touches, since peers there run blocks and nothing else"
    )
    return table


def petals_bytes(ran: Any) -> int:
    """What the same forwards would move if every touched block's states went through the client.

    Each pass enters and leaves the swarm once more than it is interrupted; each way is
    rows x tokens x width in fp32.
    """
    width_bytes = 576 * 4
    crossings = 2 * (ran.touched_blocks + 1)
    return sum(rows * ran.tokens * width_bytes * crossings for rows in ran.rows)


def amount(size_bytes: int) -> str:
    """Bytes for people, in powers of a thousand."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
