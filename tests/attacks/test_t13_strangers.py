"""T13: who is in a swarm. A private one holds strangers out; a public one is open, as is said.

The second half is no defence: it says what an attacker with many keys gets today, so that whoever
builds one sees it here, and the threat model is not read as more than it is. Over real daemons the
first half stands in tests/swarm/test_private_swarm.py. Seen failing, each alone: with `admit` of
`dht/member_gate.py` left empty, the strangers; with the bound for each key at the door taken out
there, and with those who were seen before not let past it, the last of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from joiners import ALICE, BOB, EVE, NOW
from lab import Lab, address_of, certificate_of
from soak import SEED

from glasshive.client.route import choose_route
from glasshive.dht import messages
from glasshive.dht.errors import NotLetIn, StreamClosed, StreamRefused
from glasshive.dht.member_gate import MAX_AT_THE_DOOR, MAX_AT_THE_DOOR_PER_PEER
from glasshive.dht.messages import JOIN_PROTOCOL, TRACE_PROTOCOL, Hello, encode, is_a
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import Stream
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.membership import Certificate, Role

PROTOCOLS = sorted(
    value
    for name, value in vars(messages).items()
    if name.endswith("_PROTOCOL") and value != JOIN_PROTOCOL
)
BORROWED = certificate_of(ALICE, Role.ADMIN)
SHOWN = {
    "nothing": b"",
    "junk": b"junk",
    "another's": BORROWED,
    "one that ended": certificate_of(EVE, Role.ADMIN, -11.0),
    "one of another swarm": certificate_of(EVE, Role.ADMIN, swarm="other"),
    "a client's": certificate_of(EVE, Role.CLIENT),
    "one of another issuer": Certificate(
        issuer=EVE.peer_id,
        member=EVE.peer_id,
        role=Role.ADMIN,
        swarm="lab",
        serial=b"s" * 16,
        invite=b"i" * 16,
        expires_at_seconds=NOW + 86_400.0,
    ).sign(EVE),
}


OWN = "is no certificate of its own"
SAID = {
    b"": "answered, but may not serve here: .* showed no certificate",
    b"junk": OWN,
    BORROWED: OWN,
    SHOWN["one that ended"]: "expired 11 s ago",
    SHOWN["one of another swarm"]: "got a message for swarm 'other'",
    SHOWN["one of another issuer"]: "no issuer of swarm 'lab'",
    SHOWN["a client's"]: "is a client of swarm 'lab' and may not serve",
}


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# A private swarm --------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_stranger_is_served_nothing(protocol: str) -> None:
    """Whatever it shows, and whether it waits for an answer or speaks at once."""
    lab = Lab()
    bob, _ = lab.member(BOB, Role.HOST)
    served: list[object] = []

    async def serve(stream: Stream) -> None:
        served.append(stream.peer_id)

    await bob.serve(protocol, serve)
    eve = lab.stranger(EVE)
    for kind, shown in SHOWN.items():
        if kind == "a client's":
            continue  # which opens some
        stream = await eve.open_stream(address_of(bob), protocol, 5)
        await stream.send(encode(Hello(shown)))
        with pytest.raises(StreamRefused, match="not let in: "):
            await stream.receive(5)
    stream = await eve.open_stream(address_of(bob), protocol, 5)
    await stream.send("anything else")
    with pytest.raises(StreamRefused, match="this swarm is private; join it"):
        await stream.receive(5)
    for header, body in ((encode(Hello(b"")), b"body"), ("x" * 600, b"")):
        stream = await eve.open_stream(address_of(bob), protocol, 5)
        await stream.send(header, body)
        with pytest.raises(StreamClosed):
            await stream.receive(5)
    assert not served


@pytest.mark.asyncio
@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
async def test_nothing_is_said_to_a_stranger_that_answers(shown: bytes) -> None:
    """It answers under an address that a member believed to be a host's."""
    lab = Lab()
    alice, _ = lab.member(ALICE, Role.CLIENT)
    eve = lab.stranger(EVE)
    heard = []

    async def answer(stream: Stream) -> None:
        heard.append((await stream.receive(5)).header)
        await stream.send(encode(Hello(shown)))
        heard.append((await stream.receive(5)).header)

    await eve.serve(TRACE_PROTOCOL, answer)
    with pytest.raises(NotLetIn, match=SAID[shown]):
        await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)
    await eventually(lambda: not len(eve._tasks))
    assert len(heard) == 1
    assert is_a(heard[0], Hello)


@pytest.mark.asyncio
async def test_strangers_do_not_keep_members_out() -> None:
    lab = Lab()
    alice, _ = lab.member(ALICE, Role.CLIENT)
    bob, his = lab.member(BOB, Role.HOST)

    async def echo(stream: Stream) -> None:
        await stream.send((await stream.receive(5)).header)

    await bob.serve(TRACE_PROTOCOL, echo)
    # One key has few places at the door, and its silence keeps no other key out.
    eve = lab.stranger(EVE)
    for _ in range(MAX_AT_THE_DOOR_PER_PEER):
        await eve.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    await eventually(lambda: his._at_the_door.total() == MAX_AT_THE_DOOR_PER_PEER)
    late = await eve.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    with pytest.raises(StreamRefused, match="busy: others are being let in here"):
        await late.receive(5)
    stream = await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    await stream.send("in")
    assert (await stream.receive(5)).header == "in"
    # Many keys together fill it for those who were never here, not for who was.
    for _ in range(MAX_AT_THE_DOOR):
        stranger = lab.stranger(Identity.generate())
        await stranger.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    await eventually(lambda: his._at_the_door.total() >= MAX_AT_THE_DOOR)
    stream = await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    await stream.send("in")
    assert (await stream.receive(5)).header == "in"


# A public swarm, as it is -----------------------------------------------------------------------

BLOCKS = 30
ROUTES = 30


def record_of(rng: random.Random, identity: Identity, **changes: object) -> PeerRecord:
    fields: dict[str, object] = {
        "model": ModelId("ab" * 32),
        "model_name": "tiny",
        "start": 0,
        "end": BLOCKS,
        "n_blocks": BLOCKS,
        "dtype": "float32",
        "backend": "cpu",
        "attention": "sdpa",
        "throughput_tokens_per_second": 1.0,
        "addresses": (),
        "whitelist_version": 0,
        "load": rng.random(),
        "software_version": "0",
        "peer_id": identity.peer_id,
        "expires_at_seconds": 60.0,
    }
    return PeerRecord(**(fields | changes))  # type: ignore[arg-type]


def share_of_sybils(rng: random.Random, **lies: object) -> float:
    """The share of routes with an attacker's key on them: 200 such keys among 50 honest hosts."""
    honest = [
        record_of(rng, Identity(rng.randbytes(32)), start=start, end=start + 10)
        for start in (0, 10, 20)
        for _ in range(17)
    ][:50]
    sybils = []
    for number in range(200):
        span = {"start": 10 * (number % 3), "end": 10 * (number % 3) + 10}
        sybils.append(record_of(rng, Identity(rng.randbytes(32)), **(span | lies)))
    bad = {one.peer_id for one in sybils}
    touched = 0
    for _ in range(ROUTES):
        records = [*honest, *sybils]
        rng.shuffle(records)
        route = choose_route(records, range(BLOCKS), BLOCKS)
        touched += any(one.peer_id in bad for one in route.records)
        honest = [renewed(rng, one) for one in honest]
        sybils = [one if "load" in lies else renewed(rng, one) for one in sybils]
    return touched / ROUTES


def renewed(rng: random.Random, record: PeerRecord) -> PeerRecord:
    """The same host's next record, with the load of that time."""
    return replace(record, load=rng.random())


def test_in_a_public_swarm_many_keys_draw_the_traces() -> None:
    """Open: keys cost nothing, and a route believes what peers say of themselves."""
    assert share_of_sybils(random.Random(SEED)) > 0.9, "they only are many"
    assert share_of_sybils(random.Random(SEED), load=0.0) == 1.0, "they say that they are idle"
    whole = share_of_sybils(random.Random(SEED), start=0, end=BLOCKS)
    assert whole == 1.0, "they say that they serve the whole model"
    fast = share_of_sybils(random.Random(SEED), throughput_tokens_per_second=1e9, load=1.0)
    assert fast == 1.0, "they say that they are fast, and nobody bounds how fast"
