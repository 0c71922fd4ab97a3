"""A model's configuration and tokenizer, fetched from any peer and treated as hostile.

Only files from a closed list are asked for, each within its size limit, and each is compared with
the manifest before it is kept; the manifest is compared with the model's id. Files are kept by
their hash, so a second connection needs no peer for them. No code of a model is ever run.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasshive.client.errors import BadModelFiles
from glasshive.dht.deadline import within
from glasshive.dht.errors import DeadlineExceeded, SwarmError
from glasshive.dht.messages import (
    FILES_PROTOCOL,
    SILENCE_SECONDS,
    AskFile,
    File,
    decode,
    encode,
)
from glasshive.dht.tensor_frames import receive_bytes
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.errors import SecurityError
from glasshive.security.keys import PeerId
from glasshive.security.manifest import (
    CLIENT_FILES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    decode_manifest,
)

# Whole numbers of a configuration decide how much memory the twin's tables take.
_MAX_CONFIG_INT = 1 << 24
_MAX_BLOCKS = 1024
# A configuration makes a list as long as these say, before anyone can ask it for its blocks.
_COUNTS = re.compile(r"(layers?|blocks?|depths?|labels|classes)$")
_REFUSED_KEYS = ("auto_map", "custom_pipelines", "quantization_config")


async def fetch_model_files(
    transport: Transport,
    peers: Sequence[PeerAddress],
    model_id: str,
    cache: Path,
    deadline_seconds: float,
) -> Path:
    """A folder with the configuration and tokenizer of a model, taken from the first good peer.

    One that says nothing for `SILENCE_SECONDS` may be frozen, or have others to answer first: the
    next one is asked, and after all of them it again, for twice as long, while there is time.
    Raises BadModelFiles if no peer gave files that fit the model's id, naming what each did.
    """
    folder = cache / model_id
    if (folder / MANIFEST).exists():
        return folder
    ends_at = time.monotonic() + deadline_seconds
    problems: dict[PeerId, str] = {}
    to_ask = deque((one, SILENCE_SECONDS) for one in peers)
    while to_ask and (left_seconds := ends_at - time.monotonic()) > 0:
        peer, silence_seconds = to_ask.popleft()
        # Who is the only one left keeps its place in that peer's queue.
        patience_seconds = min(left_seconds, silence_seconds) if to_ask else left_seconds
        fetching = _fetch_from(transport, peer, model_id, cache, patience_seconds)
        try:
            return await within(left_seconds, fetching, "fetching its files")
        except (SwarmError, SecurityError, BadModelFiles) as error:
            problems[peer.peer_id] = f"{peer.peer_id[-8:]}: {error}"
            if isinstance(error, DeadlineExceeded):
                # Its queue may take longer than that, and who leaves loses its place there.
                to_ask.append((peer, 2 * silence_seconds))
    said = list(problems.values())
    if any(one.peer_id not in problems for one, _ in to_ask):
        said.append(f"{deadline_seconds:g} s were over before others could be asked")
    raise BadModelFiles(
        f"no peer gave the files of model {model_id[:16]}...: {'; '.join(said) or 'none known'}"
    )


async def _fetch_from(
    transport: Transport,
    peer: PeerAddress,
    model_id: str,
    cache: Path,
    patience_seconds: float,
) -> Path:
    stream = await transport.open_stream(peer, FILES_PROTOCOL, patience_seconds)
    try:

        async def ask(name: str, limit_bytes: int) -> bytearray:
            await stream.send(encode(AskFile(model_id, name)), b"", patience_seconds)
            frame = await stream.receive(patience_seconds)
            size_bytes = decode(frame.header, File).size_bytes
            if size_bytes > limit_bytes:
                raise BadModelFiles(
                    f"{name} of {size_bytes} bytes; at most {limit_bytes} are taken"
                )
            return await receive_bytes(stream, frame, size_bytes, patience_seconds)

        raw = await ask(MANIFEST, MAX_MANIFEST_BYTES)
        manifest = decode_manifest(raw, model_id)
        files: dict[str, bytes | bytearray] = {MANIFEST: raw}
        for one in manifest.files:
            if one.name in CLIENT_FILES:
                data = await ask(one.name, min(CLIENT_FILES[one.name], one.size_bytes))
                manifest.check_file(one.name, data)
                files[one.name] = data
    finally:
        await stream.close()
    return _keep(files, cache, manifest)


def _keep(files: dict[str, bytes | bytearray], cache: Path, manifest: Manifest) -> Path:
    """Put the files in place all at once, so that nobody sees half of them."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / manifest.model_id
    with tempfile.TemporaryDirectory(dir=cache) as made:
        for name, data in files.items():
            (Path(made) / name).write_bytes(data)
        final = Path(made).with_suffix(".whole")
        os.rename(made, final)
        try:
            os.rename(final, folder)
        except OSError:  # another process was first; its files have the same hashes
            for left in final.iterdir():
                left.unlink()
            final.rmdir()
        Path(made).mkdir()  # for the context manager to remove
    return folder


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder of fetched files. Raises BadModelFiles."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFiles(f"the model's config.json cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise BadModelFiles("the model's config.json is not an object")
    for key in _REFUSED_KEYS:
        tree.pop(key, None)
    _check_integers(tree)
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise BadModelFiles(
            f"the model's type is {str(model_type)[:40]!r}, which this release of transformers "
            "does not know; update glasshive"
        )
    try:
        # Infinities stand in the file as transformers writes them.
        config = CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats(tree))
        blocks = config.get_text_config().num_hidden_layers
    except Exception as error:  # each model type fails in its own way
        raise BadModelFiles(f"the model's config.json is refused: {error!s:.300}") from error
    if type(blocks) is not int or not 0 < blocks <= _MAX_BLOCKS:
        raise BadModelFiles(f"a model of {blocks!s:.40} blocks; from 1 to {_MAX_BLOCKS} are taken")
    return config


def read_generation_config(folder: Path, config: Any) -> Any:
    """How the model's authors have it generate: a transformers GenerationConfig.

    From `generation_config.json`, or from the configuration where there is none. Raises
    BadModelFiles.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    try:
        if not path.exists():
            return GenerationConfig.from_model_config(config)
        tree = json.loads(path.read_text(encoding="utf-8"))
        return GenerationConfig.from_dict(tree)
    except Exception as error:  # fields of every type may be wrong, each in its own way
        raise BadModelFiles(
            f"the model's generation_config.json is refused: {error!s:.300}"
        ) from error


def read_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in a folder of fetched files; None if the model has none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadModelFiles(f"the model's tokenizer cannot be read: {error!s:.300}") from error


def _check_integers(tree: Any) -> None:
    work = [("", tree)]
    while work:
        name, one = work.pop()
        if isinstance(one, dict):
            work.extend(one.items())
        elif isinstance(one, list):
            work.extend((name, inner) for inner in one)
        elif isinstance(one, int):
            most = _MAX_BLOCKS if _COUNTS.search(name) else _MAX_CONFIG_INT
            if abs(one) > most:
                raise BadModelFiles(
                    f"{name[:40]!r} is {str(one)[:24]} in config.json; at most {most} is taken"
                )
