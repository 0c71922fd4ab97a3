"""Manifest, configuration and tokenizer, for clients that have no files.

Few requests are answered at a time, for each holds a whole file in memory, and each has a deadline,
so that clients which read slowly hold nobody up for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, final

from glasshive.dht.deadline import within
from glasshive.dht.errors import StreamClosed
from glasshive.dht.framing import Stream
from glasshive.dht.messages import SLICE_BYTES, AskFile, File, More, decode, encode
from glasshive.peer.errors import Busy
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import PeerId
from glasshive.security.manifest import CLIENT_FILES, MANIFEST, Manifest

log = logging.getLogger(__name__)

MAX_ANSWERS: Final = 8
ANSWER_SECONDS: Final = 300.0


@final
class FileServer:
    """Answers `AskFile` for the files of one model in `folder`.

    `check_client` raises NotAllowed for whom nothing is given, as its text says to them.
    `patience_seconds` bound the wait for a question, and that of a question for its turn.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        check_client: Callable[[PeerId], None],
        patience_seconds: float,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._check_client = check_client
        self._patience_seconds = patience_seconds
        self._answer_seconds = answer_seconds
        self._turns = asyncio.Semaphore(MAX_ANSWERS)

    async def answer(self, stream: Stream) -> None:
        """Answer one question after the other until the client closes the stream."""
        while True:
            try:
                frame = await stream.receive(self._patience_seconds)
            except StreamClosed:
                return
            ask = decode(frame.header, AskFile)
            try:
                self._check_client(stream.peer_id)
                async with self._turn():
                    sent = await within(
                        self._answer_seconds, self._send(stream, ask), "sending a file"
                    )
            except (Busy, NotAllowed) as error:
                await stream.refuse(str(error))
                return
            if not sent:
                await stream.refuse("no such file of this model")
                return

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of few at a time. Raises Busy if it doesn't come."""
        try:
            async with asyncio.timeout(self._patience_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise Busy(
                f"{MAX_ANSWERS} files are on their way; ask another peer, or later"
            ) from None
        try:
            yield
        finally:
            self._turns.release()

    async def _send(self, stream: Stream, ask: AskFile) -> bool:
        data = await asyncio.to_thread(self._read, ask)
        if data is None:
            return False
        await stream.send(encode(File(len(data))), data[:SLICE_BYTES], self._answer_seconds)
        for offset in range(SLICE_BYTES, len(data), SLICE_BYTES):
            piece = data[offset : offset + SLICE_BYTES]
            await stream.send(encode(More()), piece, self._answer_seconds)
        return True

    def _read(self, ask: AskFile) -> bytes | None:
        """What was asked for, as long as it is what the manifest says."""
        if ask.model_id != self._manifest.model_id:
            return None
        if ask.name == MANIFEST:
            return self._manifest.encode()
        known = self._manifest.file(ask.name)
        if known is None or known.name not in CLIENT_FILES:
            return None
        try:
            with (self._folder / known.name).open("rb") as file:
                data = file.read(known.size_bytes + 1)  # it may have grown since
        except OSError as error:
            log.warning("file_not_read", extra={"file": known.name, "error": str(error)})
            return None
        return data if hashlib.sha256(data).digest() == known.sha256 else None
