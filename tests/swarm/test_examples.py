"""Each script in examples/, run as a user runs it: no line changed, and in a process of its own if
it starts some.

In the cache lies a small random model of the same name and depth in place of the fetched one, so
the words that are printed mean nothing; what is printed, and that no warning is, does.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glasshive.models import SMOLLM2_WHEEL, _write_marker

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "Jack Anna the ball beach city fish sea whale Paris tower animal ocean world man"
PRINTED = {
    "activation_patching.py": (r" *'\S+'( +-?\d+\.\d\d){10}", 14),
    "generation.py": (r" *\d+( \| '.*'){4}", 12),
    "logit_lens.py": (r" *\d+ +\d\.\d\d +'.*'", 30),
    "private_swarm.py": (r"blocks (0:10|10:20|20:30) at \.\.\.\w{8}: computed for \d.*back", 3),
    "steering.py": (r" *(before|after): (\S+ \d\.\d{3}(, )?){5}", 2),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the fetched model is a small one."""
    place = tmp_path_factory.mktemp("cache")
    folder = place / "models" / SMOLLM2_WHEEL.name
    words = ["<unk>", "<pad>", *WORDS.split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=words_only, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _write_marker(folder, SMOLLM2_WHEEL)
    return place


def test_every_example_is_run() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(PRINTED)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_example_runs(
    name: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GLASSHIVE_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / name
    if "LocalSwarm" in script.read_text():
        subprocess.run([sys.executable, script], check=True, timeout=110)
    else:
        runpy.run_path(str(script), run_name="__main__")
    printed, said = capfd.readouterr()
    pattern, lines = PRINTED[name]
    found = [line for line in printed.splitlines() if re.fullmatch(pattern, line.strip())]
    assert len(found) == lines, printed
    for ours in ("RowTaken", "UnseenWrite", "Traceback", "may be ignored"):
        assert ours not in said, said[-3000:]
