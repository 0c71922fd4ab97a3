"""Random programs of reads, views, mutations and assignments equal the same in torch hooks.

`GLASSHIVE_SOAK=1` runs 10,000 programs instead of 300; `GLASSHIVE_SEED` chooses the first seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from random_edits import make_program, run_hooked_program, run_traced
from soak import SEED, SOAK, count
from stage_runner import CuttingRunner, same
from tiny_models import BLOCKS, load_plain, module_at

from glasshive.graph.errors import UnseenWrite
from glasshive.graph.graph import Site

PROGRAMS = count(300, 10_000)


@pytest.mark.timeout(0 if SOAK else 120)
def test_a_random_program_equals_torch_hooks(tiny_folder: Callable[[str], Path]) -> None:
    runner = CuttingRunner(tiny_folder("llama"), [(2,), (1, 4)])
    model, plain = runner.model(), load_plain(tiny_folder("llama"))

    def event_of(path: str, io: str) -> int:
        return runner.outline.event(Site(path, "input" if io == "input" else "output"))

    for seed in range(SEED, SEED + PROGRAMS):
        program = make_program(seed, BLOCKS, event_of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnseenWrite)
            got = run_traced(program, model, module_at)
        want = run_hooked_program(program, plain)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert same(value.value, want[name]), f"{name} of seed {seed} differs"
