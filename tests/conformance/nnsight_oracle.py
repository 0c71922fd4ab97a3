"""What an experiment gives in nnsight 0.8, run in a process of its own.

nnsight patches `object` when it is imported and reads the source of the `with` blocks from their
file, so experiments are given as text, written to a script, and answer through safetensors.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DEADLINE_SECONDS = 90.0
_STDERR_CHARS = 3000

_PRELUDE = """\
import sys
import warnings

import torch
from safetensors.torch import load_file, save_file

warnings.simplefilter("ignore")
folder, given, answers, threads, attention = sys.argv[1:]
torch.set_num_threads(int(threads))

from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

hf = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True, attn_implementation=attention
).eval()
vocabulary = {str(token): token for token in range(hf.config.vocab_size)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")),
    pad_token="0",
    unk_token="0",
)
model = TransformersModel(hf, task="text-generation", tokenizer=tokenizer)
t = load_file(given)
torch.set_grad_enabled(False)
results = {}


def keep(name, out):
    results.update({name + "/" + key: value.clone().contiguous() for key, value in out.items()})
"""

_EXPERIMENT = """\

# {name}
out = {{}}
{body}
keep({name!r}, out)
"""

_POSTLUDE = """\

save_file(results, answers)
"""


def run_nnsight(
    folder: Path,
    experiments: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    scratch: Path,
    *,
    attention: str = "sdpa",
) -> dict[str, dict[str, Tensor]]:
    """Runs each experiment's text on the model in `folder`; returns its `out` by experiment.

    The text sees `model` (nnsight's, fp32, no gradients), `t` (the tensors given) and `out`, the
    dict to fill with tensors. All experiments share one process, in the order given, with as many
    threads as torch has here. `scratch` is an empty folder. Raises `RuntimeError` with the end of
    stderr if any experiment fails, `subprocess.TimeoutExpired` after 90 seconds.
    """
    if any("/" in name for name in experiments):
        raise ValueError(f"experiments' names must have no slash: {sorted(experiments)}")
    script, given, answers = (scratch / name for name in ("run.py", "t.safetensors", "out"))
    blocks = [
        _EXPERIMENT.format(name=name, body=textwrap.dedent(body))
        for name, body in experiments.items()
    ]
    script.write_text("".join([_PRELUDE, *blocks, _POSTLUDE]))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given)
    arguments = [str(folder), str(given), str(answers), str(torch.get_num_threads()), attention]
    ran = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    if ran.returncode != 0:
        raise RuntimeError(f"nnsight's run failed:\n{ran.stderr[-_STDERR_CHARS:]}")
    outs: dict[str, dict[str, Tensor]] = {name: {} for name in experiments}
    for key, tensor in load_file(answers).items():
        name, _, inner = key.partition("/")
        outs[name][inner] = tensor
    return outs
