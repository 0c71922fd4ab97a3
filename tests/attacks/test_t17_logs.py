"""T17: what a swarm writes down has nothing of what it computed on, whatever becomes of a trace.

A private swarm of real processes, with every logger at its lowest level, audit logs included. A
client runs traces with token ids, words, constants and results that are known, and that succeed,
fail, are refused, run out of time or lose their host; then every file of every process is searched,
and what the client logs. Seen failing with the input ids, a constant, and a result logged in
`peer/host.py`, each alone, and with the text of a failure in `trace_failed`.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loud import be_loud
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trust_documents import root_now, whitelist_now

import glasshive
from glasshive.graph.errors import GlasshiveError
from glasshive.security.trust_root import first_root
from glasshive.testing import LocalSwarm, LocalTrust

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

WORDS = {"xyzzyword": 61_337, "plughword": 62_718, "frotzword": 63_141}
PROMPT = " ".join(WORDS)
VALUE = 31_415.9265
INDEX = 67_283


@pytest.fixture(scope="module")
def hive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Two hosts of one block each, of a tiny Llama whose tokenizer knows three words."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=70_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, **WORDS}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    root = root_now()
    whitelist = whitelist_now(1, first_root(root), swarm="quiet")
    # The hosts' own rule, which no client knows before it is refused.
    policy = 'deny_ops = ["sinh"]\n'
    trust = LocalTrust("quiet", root, whitelist, policy=policy, private=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSHIVE_DATA", str(tmp_path_factory.mktemp("data")))
        be_loud(patch, tmp_path_factory.mktemp("loud"))
        with LocalSwarm(folder, [(0, 1), (1, 2)], trust=trust, threads=1) as running:
            yield running


def spellings(results: torch.Tensor) -> list[re.Pattern[bytes]]:
    """How what is secret could stand in a file: as text, in hex, as bytes."""
    found = [re.escape(word.encode()) for word in WORDS]
    for number in (*WORDS.values(), INDEX):
        found += [
            rb'(?<![0-9A-Za-z.])(?<!"pid": )%d(?![0-9A-Za-z])' % number,
            re.escape(struct.pack("<q", number)),
            struct.pack("<q", number).hex().encode(),
        ]
    floats = [VALUE, *results.flatten()[:50].tolist()]
    for value in floats:
        single = struct.pack("<f", value)
        texts = {repr(value), f"{value:.6g}", f"{value:.8g}", f"{value:.4e}", f"{value:.6e}"}
        found += [re.escape(single), single.hex().encode()]
        found += [re.escape(one.encode()) for one in texts if len(one) > 6]
    return [re.compile(one) for one in found]


def leaks(written: dict[str, bytes], results: torch.Tensor) -> list[str]:
    patterns = spellings(results)
    return [
        f"{name}: {match[0]!r} in {data[max(0, match.start() - 80) : match.end() + 40]!r}"
        for name, data in written.items()
        for pattern in patterns
        if (match := pattern.search(data))
    ]


def run_all(model: glasshive.Model, hive: LocalSwarm) -> torch.Tensor:
    """Traces that end in every way; what one of them gave."""
    constant = torch.full((16,), VALUE)
    with model.trace(PROMPT):
        model.model.layers[0].output[:] = model.model.layers[0].output + constant
        saved = model.model.layers[1].output.save()
        known = (model.model.layers[1].output * 0 + constant).save()
        steered = (model.lm_head.output[0, -1, :50] * 1).save()
    assert float(known[0, 0, 0]) == pytest.approx(VALUE)
    results = torch.cat([saved.flatten(), steered.flatten()])

    def fails(kind: str, **options: float) -> str:
        """What the client is told."""
        with pytest.raises(GlasshiveError) as caught:
            with model.trace(PROMPT, **options):
                hidden = model.model.layers[1].output + constant
                if kind == "while it runs":  # by numbers that only the host has
                    wrong = (hidden[0, :1, 0] * 0).long() + INDEX
                    torch.index_select(hidden, 1, wrong).save()
                elif kind == "by the host's rule":
                    torch.sinh(hidden).save()
                elif kind == "by the budget":
                    hidden.repeat(1 << 20, 1 << 20, 1).save()
                elif kind == "in time":
                    for _ in range(40):
                        hidden = torch.linalg.svd(hidden.repeat(1, 64, 64)[0]).S + constant[0]
                    hidden.save()
                else:
                    hidden.save()
        return f"{type(caught.value).__name__}: {caught.value}"

    assert "PeerFailed: " in (said := fails("while it runs")), said
    assert "'sinh' is not allowed here" in (said := fails("by the host's rule")), said
    assert "PeerFailed: " in (said := fails("by the budget")), said
    assert "deadline" in (said := fails("in time", deadline=1.0)).lower(), said
    hive.hosts[1].kill()
    assert "PeerLost: " in (said := fails("by a lost host", deadline=3.0)), said
    return results


@pytest.mark.timeout(180)
def test_no_file_of_any_process_has_what_was_traced(
    hive: LocalSwarm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        with glasshive.connect(hive.config) as swarm:
            results = run_all(swarm.model(hive.model_name), hive)
    logs = {one.name: one.log for one in (*hive.hosts, hive.bootstrap)}
    assert all('"level": "debug"' in text for text in logs.values()), "every level is there"
    assert "trace_failed" in logs["host1"] + logs["host0"]
    written = {
        str(path.relative_to(hive.config.parent)): path.read_bytes()
        for path in hive.config.parent.rglob("*")
        if path.is_file()
    }
    assert {f"{name}.log" for name in logs} <= written.keys()
    assert any("audit" in name for name in written)
    written["client"] = "\n".join(f"{vars(one)}" for one in caplog.records).encode()
    assert leaks(written, results) == []


def test_this_test_can_fail() -> None:
    results = torch.tensor([0.123456789, -7.5e-05])
    for planted in (
        b"ids [61337, 62718]",
        b'"input_ids": [[61337]]',
        b"index 67283 is out of bounds",
        b"a plughword here",
        b"tensor([31415.9258])",
        b"3.141593e+04",
        struct.pack("<f", VALUE),
        struct.pack("<q", 61_337).hex().encode(),
        b"values 0.123457",
        repr(float(results[0])).encode(),
    ):
        assert leaks({"log": b'{"event": "x"} ' + planted}, results), planted
    assert not leaks({"log": b'{"pid": 61337, "node": 4, "took": 0.61337}'}, results)
