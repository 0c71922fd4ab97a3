"""An index that a graph computes and that is out of range: an error at the user's line, whoever
uses it, and on an accelerator before torch sees it.

There is no accelerator here: `guarded` has every peer do on the CPU what it would do on one. That
it does is seen by the text, which is not torch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, left_padded, run_hooked
from tiny_models import CUTS, DEVICE, IDS, VOCABULARY, Setting

import glasshive
from glasshive.client.errors import PeerFailed

POSITIONS = 64
UNEQUAL = [[3, 14, 15, 9, 26, 5], [35, 8, 9], [7]]

GetKind = Callable[[str], Setting]


@pytest.fixture(scope="module")
def guarded_models(tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    """Models whose peers take the CPU for an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glasshive.peer.span_model.ends_process", lambda device: True)
        return {
            k: glasshive.local(tiny_folder(k), cuts=CUTS[1], device=DEVICE)
            for k in ("llama", "gpt2")
        }


@pytest.fixture(params=["cpu", "guarded"])
def where(request: pytest.FixtureRequest) -> str:
    """What the peers take the CPU for."""
    return str(request.param)


@pytest.fixture
def get_kind(where: str, get_setting: Any, guarded_models: dict[str, Any]) -> GetKind:
    """A tiny model over two spans."""

    def get(kind: str) -> Setting:
        plainly: Setting = get_setting(kind, CUTS[1])
        return plainly if where == "cpu" else replace(plainly, model=guarded_models[kind])

    return get


def told(setting: Setting, body: Callable[[], Any], prompt: Any = IDS) -> str:
    """The text of the peer's error, which must blame the line in `body` that ends in `# blamed`."""
    with pytest.raises(PeerFailed) as caught:
        with setting.model.trace(prompt):
            body()
    lines, start = inspect.getsourcelines(body)
    blamed = next(i for i, line in enumerate(lines, start) if line.rstrip().endswith("# blamed"))
    text = str(caught.value)
    assert text.startswith(f"{Path(__file__).name}:{blamed}: "), text
    return text


def expect(text: str, where: str, ours: str, torchs: str) -> None:
    assert (ours if where == "guarded" else torchs) in text, text
    assert (torchs if where == "guarded" else ours) not in text, text


def test_ops(get_kind: GetKind, where: str) -> None:
    llama = get_kind("llama")

    def places() -> Any:
        """Numbers that only the peer knows: 6 for every row."""
        return (llama.model.model.layers[1].output[..., 0] * 0 + 6).long()

    def picked() -> None:
        logits = llama.model.lm_head.output
        logits[0, :, 0].index_select(0, places()[0]).save()  # blamed

    def gathered() -> None:
        llama.model.lm_head.output[..., 0].gather(1, places()).save()  # blamed

    def placed() -> None:
        h = llama.model.model.layers[2].output
        h[0, :, 0].scatter(0, places()[0], 1.0).save()  # blamed

    def looked_up() -> None:
        table = llama.model.model.embed_tokens.weight
        torch.nn.functional.embedding(places() * 20, table).save()  # blamed

    for body, ours in (
        (picked, "index 6 is not in 0..5"),
        (gathered, "index 6 is not in 0..5"),
        (placed, "index 6 is not in 0..5"),
        (looked_up, f"index 120 is not in 0..{VOCABULARY - 1}"),
    ):
        expect(told(llama, body), where, ours, "out of ")


def test_calls_of_an_embedding(get_kind: GetKind, where: str) -> None:
    gpt2 = get_kind("gpt2")

    def tokens() -> None:
        ids = gpt2.model.transformer.wte.input
        gpt2.model.transformer.wte(ids + 100).save()  # blamed

    def positions() -> None:
        places = gpt2.model.transformer.wpe.input
        gpt2.model.transformer.wpe(places - 1).save()  # blamed

    torchs = "index out of range in self"
    ours = f"index {IDS[0] + 100} is not in 0..{VOCABULARY - 1}"
    expect(told(gpt2, tokens), where, f"transformer.wte(...): {ours}", torchs)
    expect(told(gpt2, positions), where, f"wpe(...): index -1 is not in 0..{POSITIONS - 1}", torchs)


@pytest.mark.parametrize("prompt", [IDS, UNEQUAL], ids=["plain", "padded"])
def test_edits_of_what_an_embedding_is_given(get_kind: GetKind, where: str, prompt: Any) -> None:
    gpt2 = get_kind("gpt2")
    wpe = gpt2.model.transformer.wpe

    def tokens() -> None:
        gpt2.model.transformer.wte.input[:, -1] += 1000  # blamed
        gpt2.model.lm_head.output.save()

    def positions() -> None:
        wpe.input = wpe.input + POSITIONS  # blamed
        gpt2.model.lm_head.output.save()

    failed = "the model's forward pass failed after what was written here: "
    torchs = failed + "index out of range in self"
    text = told(gpt2, tokens, prompt)
    assert failed in text
    expect(text, where, f" is not in 0..{VOCABULARY - 1}", torchs)
    ours = f"{failed}index {POSITIONS} is not in 0..{POSITIONS - 1}"
    expect(told(gpt2, positions, prompt), where, ours, torchs)


def test_what_is_in_range_is_computed_alike(get_kind: GetKind) -> None:
    gpt2 = get_kind("gpt2")
    wpe, wte = gpt2.model.transformer.wpe, gpt2.model.transformer.wte
    last = POSITIONS - len(IDS)
    with gpt2.model.trace(UNEQUAL):
        tokens = wte.input
        called = wte(VOCABULARY - 1 - tokens).save()
        wpe.input = wpe.input + last
        logits = gpt2.model.lm_head.output
        best = logits.gather(-1, logits.argmax(-1, keepdim=True)).save()
    ids, mask = left_padded(UNEQUAL)
    edit = Edit("transformer.wpe", "input", None, lambda x: x + last, "set")
    want = run_hooked(gpt2.plain, ids, attention_mask=mask, edits=[edit])[LOGITS]
    rows = zip(best, want.amax(-1, keepdim=True), UNEQUAL, strict=True)
    assert all(torch.equal(g[-len(p) :], w[-len(p) :]) for g, w, p in rows)
    plain: Any = gpt2.plain
    assert torch.equal(called, plain.transformer.wte(VOCABULARY - 1 - ids))
