"""The directory: how a client without a DHT node learns who serves a model.

Any peer with a DHT node answers, over one stream of `DIRECTORY_PROTOCOL`::

    client                                    peer
      | header [1, model]        body empty    |    model: a name, a manifest hash, or nil for all
      | -------------------------------------> |
      | header [1, complete]     body records  |    complete: whether all that it found is in it
      | <------------------------------------- |
      | closes                                 |    (both close; the client first)

`records` is a msgpack array of signed records as bytes, at most `MAX_RECORDS` and
`MAX_ANSWER_BYTES`. The peer passes on what the DHT holds and vouches for nothing: the client checks
every signature and expiry itself. A peer can hide records, so a client that finds too few asks the
next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import re
import shlex
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final

from glasshive.dht.deadline import within
from glasshive.dht.errors import (
    AmbiguousModel,
    BadFrame,
    DeadlineExceeded,
    DirectoryUnavailable,
    RecordRefused,
    ShutOut,
    StreamRefused,
    SwarmError,
    TransportError,
    UnknownModel,
)
from glasshive.dht.framing import NOT_LET_IN, Stream
from glasshive.dht.messages import DIRECTORY_PROTOCOL
from glasshive.dht.reasons import why_unreachable
from glasshive.dht.records import (
    MODELS_KEY,
    ModelId,
    PeerRecord,
    block_key,
    lookup_key,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.errors import MalformedData, WrongSwarm
from glasshive.security.plain import decode_plain, encode_plain

__all__ = [
    "ask_directory",
    "find_records",
    "resolve",
    "serve_directory",
]

logger = logging.getLogger(__name__)

MAX_RECORDS: Final = 4096
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
REQUEST_DEADLINE_SECONDS: Final = 10.0
PEER_DEADLINE_SECONDS: Final = 10.0
APART_SECONDS: Final = 0.3
"""After so long a silence the next peer is asked as well: one that is frozen never says so."""
CACHE_SECONDS: Final = 1.0
MAX_CACHED: Final = 64
MAX_LOOK_UPS: Final = 8

_VERSION: Final = 1
_NAME_CHARACTERS: Final = 128
_MOST_NAMES: Final = 8
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/@:+,()-]{0,127}")


@dataclass(frozen=True, slots=True)
class _Answer:
    made_at_seconds: float
    complete: bool
    body: bytes


async def serve_directory(transport: Transport) -> None:
    """From now on `transport`, which has a DHT node, answers directory requests.

    Answers are kept for a second, and few look-ups run at a time, so a flood of requests costs the
    DHT little.
    """
    cache: OrderedDict[str | None, _Answer] = OrderedDict()
    look_ups = asyncio.Semaphore(MAX_LOOK_UPS)

    async def handle(stream: Stream) -> None:
        frame = await stream.receive(REQUEST_DEADLINE_SECONDS)
        model = _requested_model(frame.header)
        async with look_ups:
            answer = cache.get(model)
            if answer is None or not 0 <= transport.now() - answer.made_at_seconds <= CACHE_SECONDS:
                answer = cache[model] = await _look_up(transport, model)
                cache.move_to_end(model)
                if len(cache) > MAX_CACHED:
                    cache.popitem(last=False)
        await stream.send([_VERSION, answer.complete], answer.body)

    await transport.serve(DIRECTORY_PROTOCOL, handle)


async def find_records(transport: Transport, model: str | None) -> list[PeerRecord]:
    """The live records of `model` (name or manifest hash; None: of all) from the DHT itself.

    Needs a transport with a DHT node; raises a TransportError, NoDht, UnknownModel or
    AmbiguousModel.
    """
    return resolve(_check_all(await _signed_records(transport, model), model, transport), model)


async def ask_directory(
    transport: Transport,
    peers: Sequence[PeerAddress],
    model: str | None = None,
    deadline_seconds: float = 30.0,
    *,
    where: Sequence[str] = ("--bootstrap", "ADDRESS"),
) -> list[PeerRecord]:
    """The live records of `model` (name or manifest hash; None: of all), checked here.

    Asks the peers one after the other until one knows the model, the next one also when those
    before are silent for a moment. Withdrawn records are left out.
    Raises AmbiguousModel if the name has several manifests, UnknownModel if those that answered
    know nobody (it names models that are called alike), DirectoryUnavailable if none answered or
    only peers of other swarms did, ShutOut if none lets this key in, DeadlineExceeded. `where` are
    the arguments with which a command comes to this swarm, for what the errors advise.
    """
    if model is not None and not _MODEL.fullmatch(model):
        raise UnknownModel(
            f"got {model[:_NAME_CHARACTERS]!r}, which can't be a model's name in a swarm (it is "
            "no path); `glasshive status` lists the names that peers announce"
        )
    problems: list[str] = []
    answered: PeerAddress | None = None
    elsewhere = refused = n_asked = 0
    shut_out: list[str] = []
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + deadline_seconds
    async with contextlib.aclosing(_answers(transport, peers, model, deadline_seconds)) as answers:
        async for peer, answer in answers:
            n_asked += 1
            if isinstance(answer, SwarmError):
                problems.append(_problem(peer, answer))
                refused += isinstance(answer, StreamRefused)
                if isinstance(answer, ShutOut):
                    shut_out.append(str(answer).partition(NOT_LET_IN)[2])
                continue
            if answer and all(_is_of_another_swarm(one, transport.swarm) for one in answer):
                elsewhere += 1
                problems.append(
                    f"{_place(peer)}: it belongs to another swarm than {transport.swarm!r}"
                )
                continue
            answered = answered or peer
            records = _check_all(answer, model, transport)
            if records or model is None:
                return resolve(records, model)
    if n_asked < len(peers):
        said = f": {'; '.join(problems)}" if problems else ""
        raise DeadlineExceeded(
            f"no answer from the directory in {deadline_seconds:g} s{said}; check that one of its "
            "bootstrap peers runs, or give others"
        )
    if answered is not None and model is not None:
        known = await _names(transport, answered, ends_at - loop.time())
        raise _unknown(model, known, where)
    if not peers:
        raise DirectoryUnavailable("no bootstrap peer is known that could be asked; give one")
    if len(shut_out) == len(peers):
        raise ShutOut(
            f"the swarm {transport.swarm!r} doesn't let this key, {transport.peer_id}, in: "
            f"{'; '.join(dict.fromkeys(shut_out))}"
        )
    one = len(peers) == 1
    if refused == len(peers):
        advice = ""  # each said why
    elif elsewhere:
        advice = "check `swarm` in hive.toml or GLASSHIVE_SWARM, and the address"
    elif one:
        advice = "check that it runs, and that its address is the one that it printed at its start"
    else:
        advice = "check that one of them runs, and that the addresses are those that they printed"
    who = "the bootstrap peer gave no" if one else f"none of {len(peers)} bootstrap peers gave a"
    raise DirectoryUnavailable(f"{who} directory: {'; '.join(problems)}{advice and '; '}{advice}")


async def _answers(
    transport: Transport,
    peers: Sequence[PeerAddress],
    model: str | None,
    deadline_seconds: float,
) -> AsyncGenerator[tuple[PeerAddress, list[bytes] | SwarmError], None]:
    """What each peer says, or why it says nothing, as it comes; to be closed by who iterates.

    The first peers are preferred: one is asked when those before it have answered to no use, as
    nobody iterates on else, or are silent. Those for whom no time was left are missing.
    """
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + deadline_seconds
    # The last one, too, has half of the time to answer.
    apart_seconds = min(APART_SECONDS, deadline_seconds / 2 / max(len(peers), 1))
    to_ask = deque(peers)
    asked: dict[asyncio.Task[list[bytes]], PeerAddress] = {}
    try:
        while to_ask or asked:
            left_seconds = ends_at - loop.time()
            if to_ask and left_seconds > 0:
                peer = to_ask.popleft()
                answer = _answer(transport, peer, model, left_seconds)
                asked[asyncio.create_task(answer)] = peer
            elif not asked:
                return
            await asyncio.wait(  # each has a deadline of its own
                asked,
                timeout=apart_seconds if to_ask else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in [one for one in asked if one.done()]:
                peer = asked.pop(task)
                try:
                    signed = task.result()
                except SwarmError as error:
                    yield peer, error
                else:
                    yield peer, signed
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _answer(
    transport: Transport, peer: PeerAddress, model: str | None, deadline_seconds: float
) -> list[bytes]:
    seconds = min(deadline_seconds, PEER_DEADLINE_SECONDS)
    what = f"asking {peer.peer_id}"
    return await within(seconds, _ask(transport, peer, model, deadline_seconds), what)


def _place(peer: PeerAddress) -> str:
    return peer.addresses[0] if peer.addresses else peer.peer_id


def _problem(peer: PeerAddress, error: SwarmError) -> str:
    """Why a peer gave no directory, in one line that has its address once."""
    plain = isinstance(error, StreamRefused) or not isinstance(error, TransportError)
    said = str(error) if plain else why_unreachable(str(error))
    return f"{_place(peer)}: {said}"


def _is_of_another_swarm(data: bytes, swarm: str) -> bool:
    try:
        PeerRecord.verify(data, None, swarm=swarm)
    except RecordRefused as error:
        return isinstance(error.__context__, WrongSwarm)  # the rules' own reason
    return False


async def _names(transport: Transport, peer: PeerAddress, left_seconds: float) -> list[str]:
    """The names of all models that a peer knows of; none if it doesn't say within the time."""
    deadline_seconds = min(max(left_seconds, 0.0), PEER_DEADLINE_SECONDS)
    try:
        signed = await within(
            deadline_seconds, _ask(transport, peer, None, deadline_seconds), "asking for names"
        )
    except SwarmError:
        return []
    return sorted({record.model_name for record in _check_all(signed, None, transport)})


def resolve(records: Sequence[PeerRecord], model: str | None) -> list[PeerRecord]:
    """`records`, if they are of one manifest (any number for None).

    Raises UnknownModel or AmbiguousModel.
    """
    if model is None:
        return list(records)
    if not records:
        raise _unknown(model, (), ("--bootstrap", "ADDRESS"))
    manifests = Counter(record.model for record in records)
    if len(manifests) > 1:
        listed = ", ".join(f"{one} ({count} peers)" for one, count in sorted(manifests.items()))
        raise AmbiguousModel(
            f"the name {model} stands for {len(manifests)} manifests: {listed}; "
            "name the model by the hash that you mean"
        )
    return list(records)


def _unknown(model: str, known: Sequence[str], where: Sequence[str]) -> UnknownModel:
    """The error for a model that nobody announces, where these names are announced."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(model.lower(), by_lower, n=3, cutoff=0.6)
    if near:
        meant = " or ".join(by_lower[name] for name in near)
        return UnknownModel(f"no peer announces {model}; did you mean {meant}?")
    there = ""
    if known:
        more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
        there = f" (announced are {', '.join(known[:_MOST_NAMES])}{more})"
    return UnknownModel(
        f"no peer announces {model}{there}; check the name, or serve it with "
        f"`{shlex.join(['glasshive', 'serve', model, *where])}`"
    )


async def _ask(
    transport: Transport, peer: PeerAddress, model: str | None, deadline_seconds: float
) -> list[bytes]:
    """The signed records as the peer gave them."""
    stream = await transport.open_stream(peer, DIRECTORY_PROTOCOL, deadline_seconds)
    try:
        await stream.send([_VERSION, model], deadline_seconds=deadline_seconds)
        frame = await stream.receive(deadline_seconds)
    finally:
        stream.reset()
    header = frame.header
    if not isinstance(header, list) or len(header) != 2 or type(header[1]) is not bool:
        raise BadFrame(f"{peer.peer_id} gave a directory answer that is not [version, complete]")
    if header[0] != _VERSION:
        raise BadFrame(f"{peer.peer_id} gave a directory answer of version {header[0]!r}")
    try:
        records = decode_plain(
            frame.body, max_bytes=MAX_ANSWER_BYTES, max_depth=1, max_elements=MAX_RECORDS
        )
    except MalformedData as error:
        raise BadFrame(f"the directory of {peer.peer_id}: {error}") from None
    if not isinstance(records, list):
        raise BadFrame(f"the directory of {peer.peer_id} is not an array of records")
    signed = [record for record in records if type(record) is bytes]
    if len(signed) != len(records):
        raise BadFrame(f"the directory of {peer.peer_id} is not an array of records in bytes")
    return signed


def _check_all(
    signed: Sequence[bytes], model: str | None, transport: Transport
) -> list[PeerRecord]:
    """The newest live record of each peer and model among `signed`; the others are left out."""
    now = transport.now()
    newest: dict[tuple[str, ModelId], PeerRecord] = {}
    for data in signed:
        try:
            record = PeerRecord.verify(data, now, swarm=transport.swarm)
        except RecordRefused as error:
            logger.info("record_dropped: %s", error)
            continue
        if model is not None and model not in (record.model_name, record.model):
            continue
        if record.expires_at_seconds < now:  # within the skew, but the DHT would drop it too
            continue
        key = record.peer_id, record.model
        known = newest.get(key)
        if known is None or known.expires_at_seconds < record.expires_at_seconds:
            newest[key] = record
    live = [record for record in newest.values() if not record.withdrawn]
    return sorted(live, key=lambda record: (record.model, record.start, record.peer_id))


async def _look_up(transport: Transport, model: str | None) -> _Answer:
    """The answer to a request, cut to the bounds."""
    signed = await _signed_records(transport, model)
    chosen: list[bytes] = []
    size_bytes = 5
    for data in signed:
        size_bytes += len(data) + 3
        if len(chosen) >= MAX_RECORDS or size_bytes > MAX_ANSWER_BYTES:
            break
        chosen.append(data)
    return _Answer(transport.now(), len(chosen) == len(signed), encode_plain(chosen))


async def _signed_records(transport: Transport, model: str | None) -> list[bytes]:
    """Every distinct record that the DHT has for `model`, also withdrawn ones."""
    if model is None:
        found = await transport.fetch([MODELS_KEY])
        return list(found[MODELS_KEY].values())
    key = lookup_key(model)
    distinct = dict.fromkeys((await transport.fetch([key]))[key].values())
    # A crowded model has more peers than one key holds: the blocks' own keys have them all.
    sizes: dict[ModelId, Counter[int]] = {}
    for data in distinct:
        record = PeerRecord.verify(data, None, swarm=transport.swarm)
        sizes.setdefault(record.model, Counter())[record.n_blocks] += 1
    for manifest, counts in list(sizes.items())[:2]:
        (n_blocks, _), *_ = counts.most_common(1)
        found = await transport.fetch([block_key(manifest, block) for block in range(n_blocks)])
        for records in found.values():
            distinct.update(dict.fromkeys(records.values()))
    return list(distinct)


def _requested_model(header: object) -> str | None:
    if not isinstance(header, list) or len(header) != 2 or header[0] != _VERSION:
        raise BadFrame(f"got a directory request that is not [{_VERSION}, model]")
    model = header[1]
    if model is not None and (type(model) is not str or not _MODEL.fullmatch(model)):
        raise BadFrame("got a directory request for what can't be a model's name")
    return model
