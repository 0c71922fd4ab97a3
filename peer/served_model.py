"""Everything that a host needs to serve a span of a model, loaded from a folder on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.outline import Outline
from glasshive.graph.plan import Span
from glasshive.peer.blueprint import Blueprint
from glasshive.peer.checkpoint import Attention, Checkpoint
from glasshive.peer.device import find_device
from glasshive.peer.errors import NotEnoughMemory
from glasshive.peer.pace import HostPace, measure_pace
from glasshive.peer.span_model import SpanModel
from glasshive.security.manifest import CLIENT_FILES, Manifest, ManifestFile

OnProgress = Callable[[int, int], None]

_READ_BYTES = 1 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded span, with what is known of the whole model."""

    name: str
    folder: Path
    manifest: Manifest
    span: Span
    model: SpanModel
    twin: nn.Module
    outline: Outline
    attention: Attention
    pace: HostPace


def manifest_paths(folder: Path) -> list[Path]:
    """The files in `folder` that a manifest names, sorted."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name in CLIENT_FILES or path.name.endswith(_WEIGHT_SUFFIXES))
    )


def make_manifest(
    folder: Path, name: str, on_progress: OnProgress = lambda done, total: None
) -> Manifest:
    """The manifest of the model in `folder`: its weights, configuration and tokenizer, hashed.

    `on_progress(done_bytes, total_bytes)` is called as files are read.
    """
    wanted = manifest_paths(folder)
    total = sum(path.stat().st_size for path in wanted)
    done = 0
    files = []
    for path in wanted:
        hasher = hashlib.sha256()
        size = 0
        with path.open("rb") as stream:
            while data := stream.read(_READ_BYTES):
                hasher.update(data)
                size += len(data)
                done += len(data)
                on_progress(done, total)
        files.append(ManifestFile(path.name, size, hasher.digest()))
    return Manifest(name, tuple(files))


def load_served_model(
    folder: Path,
    name: str,
    span: Span | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: Attention = "sdpa",
    manifest: Manifest | None = None,
    blueprint: Blueprint | None = None,
    pace: HostPace | None = None,
    on_hashing: OnProgress = lambda done, total: None,
    on_loading: OnProgress = lambda done, total: None,
) -> ServedModel:
    """Load a span (None: the whole model) and check that its model type splits exactly.

    `manifest`, `blueprint` and `pace` (of this span on this device) are made here if nobody has
    them; so are the latter two if the blueprint is another model's. Raises NoSuchDevice, what
    Blueprint.of raises, and NotEnoughMemory.
    """
    device = find_device(device)
    checkpoint = Checkpoint(folder)
    chosen = span or Span(0, checkpoint.n_blocks)
    try:
        if blueprint is None or not blueprint.is_of(checkpoint, dtype, attention):
            blueprint, pace = Blueprint.of(folder, dtype, attention), None
        known = manifest or make_manifest(folder, name, on_hashing)
        model = checkpoint.load_span(
            chosen.start, chosen.end, dtype, device, attention, on_progress=on_loading
        )
        outline = blueprint.outline
        pace = pace or measure_pace(model, outline.max_positions_tokens)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed_bytes = checkpoint.span_bytes(chosen.start, chosen.end, dtype)
        raise NotEnoughMemory(
            f"memory ran out on {device} while blocks {chosen} of {name!r} were loaded: their "
            f"weights take {needed_bytes / 1e9:.2g} GB in {str(dtype).removeprefix('torch.')}, and "
            "running them takes more; serve fewer blocks with --blocks, or in a smaller number "
            "format with --dtype, or end what else takes memory"
        ) from error
    return ServedModel(name, folder, known, chosen, model, blueprint.twin, outline, attention, pace)
