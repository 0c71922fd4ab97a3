"""Roots and whitelists between neighbours: newer ones come, and nothing else is ever kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from signers import (
    CAT,
    DAN,
    EVE,
    FIRST,
    NOW,
    ROOT,
    SWARM,
    WHITELIST,
    root_document,
    signed_whitelist,
)

from glasshive.dht import trust_exchange
from glasshive.dht.errors import (
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    StreamClosed,
    StreamRefused,
    SwarmError,
)
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    TRUST_PROTOCOL,
    TrustEnd,
    TrustRoot,
    TrustVersions,
    TrustWhitelist,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress
from glasshive.dht.trust_exchange import exchange_trust, serve_trust, versions_of
from glasshive.security.errors import (
    BadTrustDocument,
    NotCurrent,
    UnderThreshold,
    WrongBody,
    WrongVersion,
)
from glasshive.security.keys import Identity
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES, next_root
from glasshive.security.trust_store import TrustStore
from glasshive.security.whitelist import MAX_BODY_BYTES

SECOND = root_document(version=2, whitelist_keys=(DAN, EVE), before=ROOT)
SECOND_ROOT = next_root(ROOT, SECOND)
THIRD = root_document(version=3, whitelist_keys=(DAN, EVE), before=SECOND_ROOT)
BY_DAN_AND_EVE = (DAN, EVE)


class Peer:
    """A peer with a store of its own."""

    def __init__(self, network: MemoryNetwork, folder: Path) -> None:
        self.transport: MemoryTransport = network.transport(Identity.generate())
        self.address = PeerAddress(self.transport.peer_id, self.transport.addresses)
        self.now = float(NOW)
        self.store = TrustStore(folder, swarm=SWARM, root=FIRST, clock=lambda: self.now)
        self.news = 0

    async def serve(self, **options: Any) -> None:
        await serve_trust(self.transport, self.store, self._count, **options)

    def _count(self) -> None:
        self.news += 1

    async def ask(self, other: Peer, **options: Any) -> TrustVersions:
        return await exchange_trust(self.transport, other.address, self.store, **options)

    @property
    def versions(self) -> tuple[int, int]:
        told = versions_of(self.store)
        return told.root, told.whitelist


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[[], Peer]]:
    network = MemoryNetwork()
    made: list[Peer] = []

    def new() -> Peer:
        made.append(Peer(network, tmp_path / str(len(made))))
        return made[-1]

    yield new
    for one in made:
        await one.transport.close()


async def says(peer: Peer, *frames: tuple[Any, bytes], first: TrustVersions | None = None) -> None:
    """From now on the peer answers an exchange with these frames, whatever its store has."""

    async def handle(stream: Stream) -> None:
        await stream.receive(5)
        for header, body in [(first or TrustVersions(9, 9), b""), *frames]:
            await stream.send(header if isinstance(header, list) else encode(header), body)
        await until_end(stream)
        await stream.send(encode(TrustVersions(9, 9)))

    await peer.transport.serve(TRUST_PROTOCOL, handle)


async def until_end(stream: Stream) -> list[object]:
    """The messages up to TrustEnd, without it."""
    found: list[object] = []
    while True:
        message = decode((await stream.receive(5)).header, TrustRoot, TrustWhitelist, TrustEnd)
        if isinstance(message, TrustEnd):
            return found
        found.append(message)


def whitelist(version: int = 7, **how: Any) -> tuple[TrustWhitelist, bytes]:
    document, body = signed_whitelist(version, **how)
    return TrustWhitelist(version, len(document)), document + body


END = (TrustEnd(), b"")


# Newer ones come --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_asks_is_brought_up_to_date(make: Callable[[], Peer]) -> None:
    old, new = make(), make()
    new.store.accept_roots([SECOND])
    new.store.accept_roots([THIRD])
    new.store.accept_whitelist(*signed_whitelist(8, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    await new.serve()
    assert await old.ask(new) == TrustVersions(3, 8)
    assert old.versions == (3, 8)
    assert new.news == 0


@pytest.mark.asyncio
async def test_who_is_asked_is_brought_up_to_date(make: Callable[[], Peer]) -> None:
    old, new = make(), make()
    new.store.accept_roots([SECOND])
    new.store.accept_whitelist(*signed_whitelist(8, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    await old.serve()
    assert await new.ask(old) == TrustVersions(2, 8)
    assert old.versions == (2, 8)
    assert old.news == 1
    assert await new.ask(old) == TrustVersions(2, 8)
    assert old.news == 1  # nothing new


@pytest.mark.asyncio
async def test_each_may_have_what_the_other_lacks(make: Callable[[], Peer]) -> None:
    one, other = make(), make()
    one.store.accept_roots([SECOND])
    other.store.accept_whitelist(*signed_whitelist(8, signed_by=BY_DAN_AND_EVE))
    await other.serve()
    assert await one.ask(other) == TrustVersions(2, 8)
    assert one.versions == other.versions == (2, 8)


@pytest.mark.asyncio
async def test_a_whitelist_signed_anew_under_a_new_root_comes(make: Callable[[], Peer]) -> None:
    old, new = make(), make()
    old.store.accept_whitelist(*signed_whitelist(7, signed_by=(CAT, DAN)))
    new.store.accept_roots([SECOND])
    new.store.accept_whitelist(*signed_whitelist(7, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    await new.serve()
    await old.ask(new)
    assert old.versions == (2, 7)


@pytest.mark.asyncio
async def test_equals_have_nothing_to_say(make: Callable[[], Peer]) -> None:
    one, other = make(), make()
    for each in (one, other):
        each.store.accept_whitelist(*signed_whitelist())
    await other.serve()
    assert await one.ask(other) == TrustVersions(1, 7)
    assert other.news == 0


# What one holds by keys that were taken away ----------------------------------------------------

THIEVES = (CAT, DAN)  # Cat's key was stolen, and Dan's; root 2 takes Cat's away
HIGHEST = 2**31 - 1


@pytest.mark.asyncio
@pytest.mark.parametrize("version", [7, HIGHEST], ids=["honest", "thief"])
@pytest.mark.parametrize("opens", ["the new", "the old"])
async def test_a_whitelist_by_old_keys_does_not_keep_a_root_away(
    make: Callable[[], Peer], version: int, opens: str
) -> None:
    """As `publish --root-alone` does it. Failed with the refusal raised before ours was sent."""
    old, new = make(), make()
    old.store.accept_whitelist(*signed_whitelist(version, signed_by=THIEVES))
    new.store.accept_roots([SECOND])
    asks, answers = (new, old) if opens == "the new" else (old, new)
    await answers.serve()
    assert await asks.ask(answers) == TrustVersions(2, 0)  # both are level: no refusal is left
    assert old.versions == new.versions == (2, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("opens", ["the new", "the old"])
async def test_a_thief_s_whitelist_does_not_keep_root_and_whitelist_away(
    make: Callable[[], Peer], opens: str
) -> None:
    """The drill over the network. Failed, where the new one opens, as above."""
    old, new = make(), make()
    old.store.accept_whitelist(*signed_whitelist(8, signed_by=THIEVES))
    new.store.accept_roots([SECOND])
    new.store.accept_whitelist(*signed_whitelist(10, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    asks, answers = (new, old) if opens == "the new" else (old, new)
    await answers.serve()
    assert await asks.ask(answers) == TrustVersions(2, 10)
    assert old.versions == new.versions == (2, 10)


@pytest.mark.asyncio
async def test_who_keeps_what_is_refused_here_is_told_of(make: Callable[[], Peer]) -> None:
    """The root gets there, and the whitelist below the thief's does not."""
    old, new = make(), make()
    old.store.accept_whitelist(*signed_whitelist(HIGHEST, signed_by=THIEVES))
    new.store.accept_roots([SECOND])
    new.store.accept_whitelist(*signed_whitelist(8, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    await old.serve()
    with pytest.raises(UnderThreshold, match="whitelist 2147483647 is signed by 1 of the keys"):
        await new.ask(old)
    assert (old.versions, new.versions) == ((2, 0), (2, 8))


@pytest.mark.asyncio
async def test_what_the_asked_refuses_keeps_nothing_from_the_asking(
    make: Callable[[], Peer],
) -> None:
    asks, answers = make(), make()
    asks.store.accept_whitelist(*signed_whitelist(8, signed_by=BY_DAN_AND_EVE))
    answers.store.accept_roots([SECOND])
    answers.now = WHITELIST.expires_seconds
    await answers.serve()
    with pytest.raises(StreamRefused, match="refused: whitelist 8 expired at"):
        await asks.ask(answers)
    assert (asks.versions, answers.versions) == ((2, 8), (2, 0))


@pytest.mark.asyncio
async def test_a_peer_that_falls_silent_does_not_hide_why_it_was_refused(
    make: Callable[[], Peer],
) -> None:
    asks, answers = make(), make()

    async def bad_then_silent(stream: Stream) -> None:
        await stream.receive(30)
        for header, body in ((HIGH, b""), whitelist(8, swarm="other"), END):
            await stream.send(encode(header), body)
        await asyncio.Event().wait()

    await answers.transport.serve(TRUST_PROTOCOL, bad_then_silent)
    with pytest.raises(BadTrustDocument, match="the whitelist of swarm 'other'") as caught:
        await asks.ask(answers, deadline_seconds=3.0)
    assert isinstance(caught.value.__cause__, DeadlineExceeded)


# Told and sent are of one moment ----------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_is_asked_tells_what_it_has_when_it_is_asked(make: Callable[[], Peer]) -> None:
    """Failed with the versions taken before the first frame came."""
    asks, answers = make(), make()
    await answers.serve()
    stream = await asks.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    for _ in range(5):
        await asyncio.sleep(0)  # the other side waits for the first frame by now
    answers.store.accept_roots([SECOND])
    await stream.send(encode(TrustVersions(1, 0)))
    assert decode((await stream.receive(5)).header, TrustVersions) == TrustVersions(2, 0)
    assert await until_end(stream) == [TrustRoot(2)]


@pytest.mark.asyncio
async def test_no_more_is_sent_than_was_told(make: Callable[[], Peer]) -> None:
    """Failed with the versions of the store looked up anew in `_send`."""
    asks, answers = make(), make()
    sent: list[object] = []

    async def handle(stream: Stream) -> None:
        await stream.receive(5)
        # Meanwhile another neighbour brings these.
        asks.store.accept_roots([SECOND])
        news = signed_whitelist(8, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE)
        asks.store.accept_whitelist(*news)
        await stream.send(encode(TrustVersions(1, 0)))
        await stream.send(encode(TrustEnd()))
        sent.extend(await until_end(stream))
        await stream.send(encode(TrustVersions(1, 0)))

    await answers.transport.serve(TRUST_PROTOCOL, handle)
    assert await asks.ask(answers) == TrustVersions(1, 0)
    assert sent == []


# Nothing else is kept ---------------------------------------------------------------------------

HIGH = TrustVersions(1, 9)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("frame", "error", "text"),
    [
        (whitelist(6), WrongVersion, "got whitelist 6, and 7 is known here"),
        (whitelist(8, signed_by=(CAT,)), UnderThreshold, "signed by 1 of the keys"),
        (whitelist(8, swarm="other"), BadTrustDocument, "the whitelist of swarm 'other'"),
        (whitelist(8, expires_seconds=NOW - 1), NotCurrent, "expired at"),
        (whitelist(9, revoked_versions=frozenset([3])), WrongVersion, "whitelist 9 is revoked"),
        ((TrustWhitelist(8, 5), b"trashtrash"), BadTrustDocument, "no root or whitelist document"),
        ((whitelist(8)[0], whitelist(8)[1] + b"x"), WrongBody, "not the one signed"),
    ],
    ids=["rollback", "threshold", "swarm", "expired", "revoked", "garbage", "body"],
)
async def test_a_bad_whitelist_is_refused_on_both_sides(
    make: Callable[[], Peer], frame: tuple[Any, bytes], error: type[Exception], text: str
) -> None:
    asks, answers = make(), make()
    for one in (asks, answers):
        one.store.accept_whitelist(*signed_whitelist())
    await says(answers, frame, END, first=HIGH)
    with pytest.raises(error, match=text):
        await asks.ask(answers)
    assert asks.versions == (1, 7)

    await answers.serve()
    stream = await asks.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    await stream.send(encode(HIGH))
    for header, body in (frame, END):
        await stream.send(encode(header), body)
    with pytest.raises(StreamRefused, match=f"these documents are refused: .*{text[:40]}"):
        for _ in range(4):
            await stream.receive(5)
    assert answers.versions == (1, 7)
    assert answers.news == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("frames", "error", "text"),
    [
        ([(TrustRoot(2), b"{}")], BadTrustDocument, "no root or whitelist document"),
        ([(TrustRoot(2), FIRST)], WrongVersion, "got root 1 after root 1"),
        (
            [(TrustRoot(2), root_document(version=2, signed_by=(CAT,)))],
            UnderThreshold,
            "signed by 1 of",
        ),
        ([(TrustRoot(3), THIRD)], MalformedMessage, "got root 3 of .*root 2 would be the next"),
        ([(TrustRoot(2), SECOND)] * 2, MalformedMessage, "root 3 would be the next"),
        ([(TrustRoot(2), b"x" * (MAX_DOCUMENT_BYTES + 1))], MalformedMessage, "16384 are allowed"),
        ([whitelist(8), whitelist(8)], MalformedMessage, "after the whitelist, which comes last"),
        ([whitelist(8), (TrustRoot(2), SECOND)], MalformedMessage, "comes last"),
        ([(TrustWhitelist(8, 0), b"x")], MalformedMessage, "a whitelist of 0 and 1 bytes"),
        ([(TrustWhitelist(8, 9), b"x")], MalformedMessage, "a whitelist of 1 and 0 bytes"),
        ([([41, -1], b"")], MalformedMessage, "TrustRoot.version is no Count"),
        ([([6], b"")], MalformedMessage, "got Run"),
    ],
)
async def test_documents_out_of_turn_or_bounds_are_refused(
    make: Callable[[], Peer],
    frames: list[tuple[Any, bytes]],
    error: type[Exception],
    text: str,
) -> None:
    asks, answers = make(), make()
    await says(answers, *frames, END)
    with pytest.raises(error, match=text):
        await asks.ask(answers)
    assert asks.versions == (1, 0)


@pytest.mark.asyncio
async def test_roots_beyond_those_that_were_told_are_refused(make: Callable[[], Peer]) -> None:
    asks, answers = make(), make()
    await says(answers, (TrustRoot(2), SECOND), (TrustRoot(3), THIRD), first=TrustVersions(2, 0))
    with pytest.raises(MalformedMessage, match=r"got root 3 of .*, which told 2"):
        await asks.ask(answers)
    assert asks.versions == (1, 0)


@pytest.mark.asyncio
async def test_a_frame_that_is_too_long_is_not_even_read(
    make: Callable[[], Peer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asks, answers = make(), make()
    body = b"x" * (MAX_DOCUMENT_BYTES + MAX_BODY_BYTES + 1)
    await says(answers, (TrustWhitelist(8, 100), body))
    with pytest.raises(FrameTooLarge, match="278529 bytes, at most 256 and 278528 are accepted"):
        await asks.ask(answers)
    await answers.serve()
    stream = await asks.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    await stream.send(encode(HIGH))
    with pytest.raises(SwarmError):
        await stream.send(encode(TrustWhitelist(8, 100)), body)
        while True:
            await stream.receive(5)
    assert answers.news == 0
    said = [one.getMessage() for one in caplog.records]
    assert any("a body of 278529 bytes, at most 256 and 278528 are accepted" in one for one in said)


@pytest.mark.asyncio
async def test_a_root_that_is_good_stays_though_the_whitelist_behind_it_is_not(
    make: Callable[[], Peer],
) -> None:
    asks, answers = make(), make()
    await says(answers, (TrustRoot(2), SECOND), whitelist(8), END, first=TrustVersions(2, 8))
    with pytest.raises(UnderThreshold):  # root 2 took Cat's key away
        await asks.ask(answers)
    assert asks.versions == (2, 0)


# Time and number --------------------------------------------------------------------------------


async def silent(stream: Stream) -> None:
    await stream.receive(30)
    await asyncio.Event().wait()


async def dripping(stream: Stream) -> None:
    await stream.receive(30)
    await stream.send(encode(TrustVersions(3, 0)))
    await stream.send(encode(TrustRoot(2)), SECOND)
    await asyncio.Event().wait()


@pytest.mark.asyncio
@pytest.mark.parametrize("handler", [silent, dripping])
async def test_an_exchange_has_a_deadline(
    make: Callable[[], Peer], handler: Callable[[Stream], Awaitable[None]]
) -> None:
    asks, answers = make(), make()
    await answers.transport.serve(TRUST_PROTOCOL, handler)
    with pytest.raises(DeadlineExceeded):
        await asks.ask(answers, deadline_seconds=0.2)
    assert asks.versions == (1, 0)


@pytest.mark.asyncio
async def test_who_drips_is_let_go_too(make: Callable[[], Peer]) -> None:
    drips, answers = make(), make()
    await answers.serve(deadline_seconds=0.4)
    stream = await drips.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    await stream.send(encode(TrustVersions(200, 0)))
    for _ in range(2):
        await stream.receive(5)  # what it has, which is nothing
    with pytest.raises(StreamClosed):
        for version in range(2, 200):
            await stream.send(encode(TrustRoot(version)), b"x")
            with contextlib.suppress(DeadlineExceeded):
                await stream.receive(0.1)  # sooner than the other side gives up one wait
    assert version < 20


@pytest.mark.asyncio
async def test_a_stranger_has_one_place_and_shuts_nobody_out(make: Callable[[], Peer]) -> None:
    """Failed with no look at who runs one already: the second was not refused."""
    quiet, answers, honest = make(), make(), make()
    answers.store.accept_whitelist(*signed_whitelist())
    await answers.serve()
    first = await quiet.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    for _ in range(trust_exchange.MAX_STRANGERS):
        more = await quiet.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
        with pytest.raises(StreamRefused, match="busy: another exchange with you runs here"):
            await more.receive(5)
        await more.close()
    await honest.ask(answers)
    assert honest.versions == (1, 7)
    await first.send(encode(TrustVersions(1, 0)))  # it is heard as before
    assert decode((await first.receive(5)).header, TrustVersions) == TrustVersions(1, 7)


@pytest.mark.asyncio
async def test_a_peer_that_is_known_always_has_a_place(
    make: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed with `known` left out of the count."""
    monkeypatch.setattr(trust_exchange, "MAX_STRANGERS", 1)
    quiet, answers, known, stranger = make(), make(), make(), make()
    answers.store.accept_whitelist(*signed_whitelist())
    await answers.serve(known=[known.transport.peer_id])
    await quiet.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    for _ in range(5):
        await asyncio.sleep(0)
    with pytest.raises(StreamRefused, match="busy: 1 exchanges run here"):
        await stranger.ask(answers)
    assert await known.ask(answers) == TrustVersions(1, 7)


@pytest.mark.asyncio
async def test_an_exchange_without_documents_leaves_the_store_alone(
    make: Callable[[], Peer], tmp_path: Path
) -> None:
    """Failed, with "can't lock", with an `accept` of nothing on either side."""
    asks, answers = make(), make()
    for one in (asks, answers):
        one.store.accept_whitelist(*signed_whitelist())
    for number in "01":
        (tmp_path / number / "trust.lock").unlink(missing_ok=True)
        (tmp_path / number / "trust.lock").mkdir()
    await answers.serve()
    assert await asks.ask(answers) == TrustVersions(1, 7)


@pytest.mark.asyncio
async def test_one_exchange_may_follow_another_at_once(
    make: Callable[[], Peer], caplog: pytest.LogCaptureFixture
) -> None:
    """Failed with the turn held until the refusal was heard."""
    asks, answers = make(), make()
    await answers.serve()
    stream = await asks.transport.open_stream(answers.address, TRUST_PROTOCOL, 5)
    await stream.send(encode(HIGH))
    for header, body in (whitelist(8, swarm="other"), END):
        await stream.send(encode(header), body)
    async with asyncio.timeout(10):
        while "trust_refused" not in caplog.text:  # noqa: ASYNC110 (a log has no event)
            await asyncio.sleep(0)
    assert await asks.ask(answers) == TrustVersions(1, 0)


@pytest.mark.asyncio
async def test_who_begins_and_falls_silent_is_let_go(
    make: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_exchange, "MAX_STRANGERS", 4)
    answers, honest, *quiet = (make() for _ in range(6))
    answers.store.accept_whitelist(*signed_whitelist())
    await answers.serve(deadline_seconds=0.5)
    streams = [await one.transport.open_stream(answers.address, TRUST_PROTOCOL, 5) for one in quiet]
    await asyncio.sleep(0)
    with pytest.raises(StreamRefused, match="busy: 4 exchanges run here; try again soon"):
        await honest.ask(answers)
    for one in streams:
        with pytest.raises(SwarmError):
            await one.receive(10)
    async with asyncio.timeout(10):
        while honest.versions != (1, 7):
            try:
                await honest.ask(answers)
            except StreamRefused:
                await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_store_that_can_not_keep_says_nothing_of_this_machine(
    make: Callable[[], Peer], tmp_path: Path
) -> None:
    new, full = make(), make()
    new.store.accept_whitelist(*signed_whitelist())
    (tmp_path / "1").mkdir(exist_ok=True)
    (tmp_path / "1" / "trust").mkdir()  # where the file would be
    await full.serve()
    with pytest.raises(StreamRefused) as caught:
        await new.ask(full)
    assert str(tmp_path) not in str(caught.value)
    assert "documents can't be kept here now; try another peer" in str(caught.value)
    assert full.versions == (1, 0)


@pytest.mark.asyncio
async def test_many_at_once_agree(make: Callable[[], Peer]) -> None:
    hub, *others = (make() for _ in range(4))
    hub.store.accept_roots([SECOND])
    hub.store.accept_whitelist(*signed_whitelist(8, root=SECOND_ROOT, signed_by=BY_DAN_AND_EVE))
    late = make()
    for one in (late, *others):
        await one.serve()
    # Several neighbours bring the same to one at the same time.
    await asyncio.gather(*(hub.ask(one) for one in others))
    await asyncio.gather(*(one.ask(late) for one in others))
    assert late.versions == (2, 8)
    assert all(one.versions == (2, 8) for one in others)
