"""Read the part of a Hugging Face checkpoint that one span needs, from a local folder.

The folder holds `config.json` and the weights as safetensors, in one file or in shards with
`model.safetensors.index.json`. Nothing is fetched, no code of the checkpoint is run, no pickled
file is opened. The model class is built without data and pruned to the span; Hugging Face's own
loader (with its renames and fusions) then asks for what is left, tensor by tensor, and only then is
a shard opened. A weight that no file holds is an error: Hugging Face would fill it with random
numbers.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from glasshive.graph.memory import is_out_of_memory
from glasshive.peer.errors import (
    BadCheckpoint,
    HostError,
    MissingTensor,
    ModelTypeRefused,
    UnsupportedAttention,
    WrongWeights,
)
from glasshive.peer.span_model import Layout, SpanModel, check_span, find_layout, prune

Attention = Literal["eager", "sdpa", "flash"]
OnProgress = Callable[[int, int], None]

HF_ATTENTION: dict[Attention, str] = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash": "flash_attention_2",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PAGE_BYTES = 4096
_MAX_CONFIG_BYTES = 4 << 20
_MAX_INDEX_BYTES = 64 << 20
# Settings of a checkpoint that name code, change classes or change what forward returns.
_STRIPPED = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "torchscript",
        "transformers_weights",
    }
)


class Checkpoint:
    """A model on disk: `config.json` is read and checked at once, weights when a span is loaded.

    Raises `BadCheckpoint` where the folder holds no such model, `ModelTypeRefused` where this
    release of transformers has no decoder class for it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path)
        self.model_type: str = self.config.model_type
        self.model_class = model_class_for(self.config)
        self.n_blocks = _n_blocks(self.config, self.path)

    def span_bytes(self, start: int, end: int, dtype: torch.dtype) -> int:
        """The bytes that the parameters of the span `[start, end)` take in `dtype`.

        Raises `BadSpan`.
        """
        check_span(start, end, self.n_blocks, str(self.path))
        with torch.device("meta"), quiet():
            model = _span_class(self.model_class, start, end, [])(self.config)
        elements: int = sum(parameter.numel() for parameter in model.parameters())
        return elements * dtype.itemsize

    def attentions(self) -> tuple[Attention, ...]:
        """The attention backends that this model's class and this machine support."""
        return supported_attentions(self.model_class)

    def load_span(
        self,
        start: int,
        end: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: Attention = "sdpa",
        on_progress: OnProgress | None = None,
    ) -> SpanModel:
        """Load the blocks `[start, end)`, with the embedding if first and norm and head if last.

        `on_progress(done_bytes, total_bytes)` is called as tensors are read, from the loader's
        threads but never by two at once; its last call has both equal. Weights that need no
        conversion stay mapped from the file, so the file must not change while the span is served.

        Raises `BadSpan`, `MissingTensor`, `WrongWeights`, `UnsupportedAttention`,
        `ModelTypeRefused`; out of memory, what says so (`is_out_of_memory`).
        """
        check_span(start, end, self.n_blocks, str(self.path))
        shards = _Shards(self.path, dtype, on_progress)
        return load_span_from(
            self.config,
            shards.tensors,
            start,
            end,
            dtype=dtype,
            device=torch.device(device),
            attention=attention,
            shards=shards,
        )


def model_class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal decoder class of this configuration.

    Raises `ModelTypeRefused` where transformers has none.
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(found, (tuple, list)):
        found = found[0]
    if found is None:
        raise ModelTypeRefused(
            f"model type {config.model_type!r} has no causal decoder class in this release of "
            "transformers; serve a decoder model"
        )
    return cast("type[PreTrainedModel]", found)


def supported_attentions(model_class: type[PreTrainedModel]) -> tuple[Attention, ...]:
    """The attention backends that `model_class` and this machine support, `eager` always first."""
    supported: list[Attention] = ["eager"]
    if model_class._supports_sdpa:
        supported.append("sdpa")
    if model_class._supports_flash_attn and is_flash_attn_2_available():
        supported.append("flash")
    return tuple(supported)


def check_attention(model_class: type[PreTrainedModel], attention: Attention) -> None:
    """Raise `UnsupportedAttention` unless `model_class` and this machine support the backend."""
    supported = supported_attentions(model_class)
    if attention not in supported:
        raise UnsupportedAttention(
            f"got attention {attention!r}, but {model_class.__name__} on this machine supports "
            f"only {', '.join(supported)}; choose one of those"
        )


def load_span_from(
    config: PreTrainedConfig,
    tensors: Mapping[str, Any],
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention,
    shards: _Shards | None = None,
) -> SpanModel:
    """A span made of `tensors`: checkpoint name to tensor, or to what gives one when indexed by
    `...`. Raises what `Checkpoint.load_span` raises."""
    model_class = model_class_for(config)
    if dtype not in _DTYPES:
        raise WrongWeights(f"got dtype {dtype}, wanted one of {', '.join(map(str, _DTYPES))}")
    check_attention(model_class, attention)
    built: list[Layout] = []
    span_class = _span_class(
        model_class, start, end, built, None if shards is None else shards.plan
    )
    try:
        with quiet():
            model, info = span_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                attn_implementation=HF_ATTENTION[attention],
                output_loading_info=True,
                # So that wrong shapes come back by name; they are an error below.
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except HostError:
        raise
    except AttributeError as error:
        raise ModelTypeRefused(
            f"{model_class.__name__} cannot be cut into spans, its code reaches into what another "
            f"peer holds: {first_line(error)}; serve another model"
        ) from error
    except Exception as error:
        if shards is not None and shards.failure is not None:
            raise shards.failure from error
        if is_out_of_memory(error):
            raise
        if is_out_of_memory(RuntimeError(text := _conversion_errors(error))):
            raise MemoryError(text) from error
        raise WrongWeights(
            f"the weights of {model_class.__name__} could not be loaded: {first_line(error)}; "
            "check that config.json and the weight files belong together"
        ) from error
    _check_loaded(info, "the tensors given" if shards is None else shards.names_text(), start, end)
    model.config.return_dict = True
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    if device.type == "cpu":
        _leave_files(model)
    if shards is not None:
        shards.finish()
    return SpanModel(model, layout=built[0], start=start, end=end, dtype=dtype, device=device)


def _leave_files(model: PreTrainedModel) -> None:
    """Copy the weights, one after the other, out of the files that they are still mapped from.

    A file that is changed in place would change what runs here; one cut short would end the host.
    A copy begins at the same place in a page: kernels choose their way, and so the last bits of
    their results, by alignment.
    """
    for weight in itertools.chain(model.parameters(), model.buffers()):
        old = weight.data
        if old.numel() == 0:
            continue
        steps = zip(old.shape, old.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in steps)
        room = torch.empty(count * old.itemsize + _PAGE_BYTES, dtype=torch.uint8)
        first = (old.data_ptr() - room.data_ptr()) % _PAGE_BYTES
        flat = room[first : first + count * old.itemsize].view(old.dtype)
        flat.copy_(old.as_strided((count,), (1,)))
        weight.data = flat.as_strided(old.shape, old.stride())


def _conversion_errors(error: BaseException) -> str:
    """What went wrong where the loader fused tensors. It keeps the texts, and raises another."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        info = frame.f_locals.get("loading_info")
        if isinstance(texts := getattr(info, "conversion_errors", None), dict):
            return "\n".join(map(str, texts.values()))
    return ""


def _check_loaded(info: dict[str, Any], where: str, start: int, end: int) -> None:
    if info["missing_keys"]:
        names = tuple(sorted(info["missing_keys"]))
        raise MissingTensor(
            f"{len(names)} tensors of the span {start}:{end} are missing: {_some(names)}; "
            f"looked in {where}; fetch the checkpoint again",
            names=names,
        )
    if info["mismatched_keys"]:
        wrong = [
            f"{name} has shape {list(got)}, wanted {list(wanted)}"
            for name, got, wanted in sorted(info["mismatched_keys"])
        ]
        raise WrongWeights(
            f"{len(wrong)} tensors have the wrong shape: {_some(wrong)}; "
            "config.json and the weight files do not belong together"
        )


def _span_class(
    model_class: type[PreTrainedModel],
    start: int,
    end: int,
    built: list[Layout],
    on_built: Callable[[PreTrainedModel], None] | None = None,
) -> Any:
    """`model_class`, pruned to the span as soon as it is built; its layout is added to `built`.

    Name and module stay those of the class: transformers looks things up by them.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, **kwargs: Any) -> None:  # noqa: N807
        model_class.__init__(self, config, **kwargs)
        layout = find_layout(self, self.config)
        prune(self, layout, start, end)
        built.append(layout)
        if on_built is not None:
            on_built(self)

    body = {"__init__": __init__, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), body)


def _read_config(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is no folder; give the folder that holds config.json")
    settings = _read_json(folder / "config.json", _MAX_CONFIG_BYTES)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = (
            " (its own code, named by auto_map, is never run)" if "auto_map" in settings else ""
        )
        raise ModelTypeRefused(
            f"model type {model_type!r} is unknown to this release of transformers{own_code}; "
            "serve a model whose architecture transformers has"
        )
    if settings.get("quantization_config") is not None:
        raise BadCheckpoint(
            f"{folder} is quantised, which is not supported yet; give a checkpoint in bfloat16, "
            "float16 or float32"
        )
    kept = {name: value for name, value in settings.items() if name not in _STRIPPED}
    try:
        return CONFIG_MAPPING[model_type].from_dict(kept)
    except Exception as error:
        raise BadCheckpoint(
            f"{folder / 'config.json'} is no valid configuration of {model_type!r}: "
            f"{first_line(error)}"
        ) from error


def _n_blocks(config: PreTrainedConfig, folder: Path) -> int:
    try:
        n_blocks = config.get_text_config().num_hidden_layers
    except Exception:
        n_blocks = None
    if not isinstance(n_blocks, int) or n_blocks < 1:
        raise BadCheckpoint(
            f"{folder / 'config.json'} gives {n_blocks!r} as the number of blocks, wanted 1 or more"
        )
    return n_blocks


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > max_bytes:
            raise BadCheckpoint(
                f"{path} has more than {max_bytes} bytes; it is no file of a checkpoint"
            )
        content = json.loads(path.read_bytes(), object_hook=_special_float)
    except FileNotFoundError:
        raise BadCheckpoint(
            f"{path} is missing; give a folder in the Hugging Face layout"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds no JSON object")
    return content


def _special_float(pairs: dict[str, Any]) -> Any:
    """JSON has no infinity: transformers writes it as `{"__float__": "Infinity"}`."""
    if pairs.keys() == {"__float__"}:
        return float(pairs["__float__"])
    return pairs


class _Shards:
    """The weight files of a folder: names first, contents when asked for.

    `tensors` maps every tensor's name in the checkpoint to something that the loader reads by
    `[...]`. The first thing that goes wrong is kept as `failure`, and later reads fail at once with
    it: the loader itself would go on to the end and report less.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, on_progress: OnProgress | None) -> None:
        self.failure: Exception | None = None
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self._dtype = dtype
        self._on_progress = on_progress
        self._done_bytes = 0
        self._total_bytes = 0
        file_of = _file_of_tensor(folder)
        self._files = sorted(set(file_of.values()))
        self.tensors = {name: _LazyTensor(self, path, name) for name, path in file_of.items()}

    def names_text(self) -> str:
        return _some([str(path) for path in self._files])

    def plan(self, model: PreTrainedModel) -> None:
        """Take the size of the pruned model as the total of the progress."""
        unique = {id(value): value.numel() for value in model.state_dict(keep_vars=True).values()}
        self._total_bytes = sum(unique.values()) * self._dtype.itemsize

    def finish(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._total_bytes, self._total_bytes)

    def read(self, path: Path, name: str) -> Tensor:
        with self._lock:
            if self.failure is not None:
                raise self.failure
            try:
                if path not in self._open:
                    self._open[path] = _open_weights(path)
                shard = self._open[path]
            except Exception as error:
                self.failure = error
                raise
        try:
            tensor: Tensor = shard.get_slice(name)[...]
        except Exception as error:
            if is_out_of_memory(error):
                self.failure = error
                raise
            self.failure = WrongWeights(
                f"{name} cannot be read from {path}: {first_line(error)}; fetch the file again"
            )
            raise self.failure from error
        if self._on_progress is not None:
            with self._lock:
                # Converted on the way, so a file in another dtype counts as what it becomes. The
                # last call is `finish`: until then stay below the total.
                self._done_bytes += tensor.numel() * self._dtype.itemsize
                self._on_progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
        return tensor


class _LazyTensor:
    """A tensor of a file, read when the loader indexes it with `...`."""

    __slots__ = ("_name", "_path", "_shards")

    def __init__(self, shards: _Shards, path: Path, name: str) -> None:
        self._shards = shards
        self._path = path
        self._name = name

    def __getitem__(self, index: object) -> Tensor:
        if index is not Ellipsis:
            raise TypeError(f"a lazy tensor is read whole, by [...], not by [{index!r}]")
        return self._shards.read(self._path, self._name)


def _file_of_tensor(folder: Path) -> dict[str, Path]:
    index_path, single_path = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_path.exists():
        if not single_path.exists():
            raise BadCheckpoint(
                f"{folder} holds neither {single_path.name} nor {index_path.name}; only "
                "safetensors are read, convert other files first"
            )
        return dict.fromkeys(_open_weights(single_path).keys(), single_path)
    weight_map = _read_json(index_path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index_path} has no weight_map; fetch the checkpoint again")
    for file_name in set(map(str, weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{index_path} names the file {file_name!r}; only safetensors files in the folder "
                "itself are read"
            )
    return {name: folder / str(file_name) for name, file_name in weight_map.items()}


def _open_weights(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise WrongWeights(f"{path} is missing; fetch the checkpoint again") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise WrongWeights(
            f"{path} is no whole safetensors file: {first_line(error)}; fetch it again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports off the terminal: what they would say
    comes back as our progress and our errors."""
    bars = hf_logging.is_progress_bar_enabled()
    root = logging.getLogger("transformers")
    level = root.level
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def first_line(error: BaseException) -> str:
    """What `error` says, short enough for a line of ours."""
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
