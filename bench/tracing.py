"""What recording costs the client: each op, and an experiment of 30 saves and 30 edits, warm.

The other arm is what the same Python does on plain tensors (an op's own cost), and nnsight 0.8
tracing the same experiment with a model that does nothing is not offered by it, so it is left out.
Bars: <= 25 microseconds an op, <= 20 ms for 30 saves and 30 edits.
"""

from __future__ import annotations

import contextlib

import torch
from harness import interleaved, report

import glasshive


def main() -> None:
    """Print the figures."""
    model = glasshive.local("SmolLM2-135M-Instruct")
    layers = model.model.layers
    ops = 200

    def record_ops() -> None:
        with model.trace("The Eiffel Tower is in the city of"):
            h = layers[5].output
            for _ in range(ops):
                h = h * 1.5
            raise _Abandoned

    def record_experiment() -> None:
        with model.trace("The Eiffel Tower is in the city of"):
            for layer in layers:
                layer.mlp.output[:, -1] = 0
                layer.output[:, -1].save()
            raise _Abandoned

    def finish_experiment() -> None:
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            for layer in layers:
                layer.mlp.output[:, -1] = 0
                layer.output[:, -1].save()
            tracer._finish()
            raise _Abandoned

    plain = torch.randn(1, 9, 576)

    def plain_ops() -> None:
        h = plain
        for _ in range(ops):
            h = h * 1.5

    def quiet(run):
        def arm() -> None:
            with contextlib.suppress(_Abandoned):
                run()

        return arm

    found = interleaved(
        {
            "200 ops recorded": quiet(record_ops),
            "200 ops on plain tensors": plain_ops,
            "30 saves + 30 edits recorded": quiet(record_experiment),
            "30 saves + 30 edits recorded, simplified, put in passes": quiet(finish_experiment),
        },
        repeats=30,
        warm_up=3,
    )
    rows = [[name, 1e3 * one.median, 1e3 * one.least] for name, one in found.items()]
    op_us = 1e6 * found["200 ops recorded"].median / ops
    rows.append(["one op recorded, microseconds", op_us, op_us])
    report(
        "tracing",
        ["arm", "median ms", "least ms"],
        rows,
        {"op_us": op_us, **{name: one.median for name, one in found.items()}},
    )


class _Abandoned(Exception):
    """Leaves a trace without running it."""


if __name__ == "__main__":
    main()
