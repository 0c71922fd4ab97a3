"""The fault proxy before a plain server: what passes without faults, and what each fault does.

Times have lower bounds, which hold on any machine, and deadlines far above what is expected.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from waits import wait_for

from glasshive.dht.errors import ListenRefused, TransportClosed
from glasshive.fault_proxy import FaultProxy, Faults

DEADLINE_SECONDS = 30.0
WINDOW_BYTES = 256 << 10


class Server:
    """Takes connections; the tests read and write at its ends of them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_SECONDS)
        self._ends: list[socket.socket] = []
        self.address: tuple[str, int] = self._listener.getsockname()

    def take(self) -> socket.socket:
        end, _ = self._listener.accept()
        end.settimeout(DEADLINE_SECONDS)
        self._ends.append(end)
        return end

    def dial(self, port: int) -> socket.socket:
        end = socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
        self._ends.append(end)
        return end

    def close(self) -> None:
        for one in (self._listener, *self._ends):
            one.close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.address, window_bytes=WINDOW_BYTES) as running:
        yield running


@pytest.fixture
def ends(server: Server, proxy: FaultProxy) -> tuple[socket.socket, socket.socket]:
    """A connection through the proxy: the client's end and the server's."""
    return server.dial(proxy.port), server.take()


def read(end: socket.socket, n_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < n_bytes:
        piece = end.recv(n_bytes - len(data))
        if not piece:
            pytest.fail(f"the stream ended after {len(data)} of {n_bytes} bytes")
        data += piece
    return bytes(data)


def send_all(end: socket.socket, data: bytes) -> threading.Thread:
    """Sends in a thread of its own, as the other end may have to read for it to go on."""
    thread = threading.Thread(target=end.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def reset_at(end: socket.socket) -> None:
    """Returns when the end has been reset, rather than ended or left open."""
    with pytest.raises(ConnectionResetError):
        while end.recv(1 << 16):
            pass


PATTERN = bytes(i * i % 251 for i in range(3 << 20))


def test_bytes_pass_both_ways_and_are_counted(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    sent = send_all(client, PATTERN)
    assert read(target, len(PATTERN)) == PATTERN
    sent.join()
    target.sendall(b"back")
    assert read(client, 4) == b"back"
    assert (proxy.connections, proxy.open_connections) == (1, 1)
    up, down = proxy.upstream, proxy.downstream
    wait_for(lambda: (up.delivered_bytes, down.delivered_bytes) == (len(PATTERN), 4), "counted")
    assert (up.taken_bytes, down.taken_bytes) == (len(PATTERN), 4)
    assert up.corrupted_bytes == down.corrupted_bytes == 0


def test_an_end_of_stream_passes_and_leaves_the_other_direction(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    client.sendall(b"last")
    client.shutdown(socket.SHUT_WR)
    assert read(target, 4) == b"last"
    assert target.recv(1) == b""
    target.sendall(b"still")
    assert read(client, 5) == b"still"
    target.close()
    assert client.recv(1) == b""
    wait_for(lambda: proxy.open_connections == 0, "over")


@pytest.mark.parametrize("who", [0, 1])
def test_a_reset_passes(who: int, ends: tuple[socket.socket, socket.socket]) -> None:
    gone = ends[who]
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    reset_at(ends[1 - who])


def test_who_sends_to_one_that_is_gone_is_reset(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    client.close()
    assert target.recv(1) == b""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            target.sendall(PATTERN)
    wait_for(lambda: proxy.open_connections == 0, "over")


def test_latency_delays_each_byte_and_not_the_next(server: Server) -> None:
    with FaultProxy(server.address) as proxy:
        client, target = server.dial(proxy.port), server.take()
        proxy.upstream.faults = Faults(latency_seconds=0.5)
        proxy.downstream.faults = Faults(latency_seconds=0.25)
        began = time.monotonic()
        sent = send_all(client, PATTERN)  # 48 pieces: one after the other they would take 24 s
        assert read(target, len(PATTERN)) == PATTERN
        assert 0.45 < time.monotonic() - began < 12
        sent.join()
        began = time.monotonic()
        target.sendall(b"x")
        assert read(client, 1) == b"x"
        assert time.monotonic() - began > 0.2


def test_latency_that_ends_is_over_for_what_is_on_its_way(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    proxy.upstream.faults = Faults(latency_seconds=1000)
    client.sendall(b"late")
    wait_for(lambda: proxy.upstream.taken_bytes == 4, "taken")
    assert proxy.upstream.delivered_bytes == 0
    proxy.upstream.faults = Faults()
    assert read(target, 4) == b"late"


def test_bandwidth_is_shared_by_all_connections(server: Server, proxy: FaultProxy) -> None:
    pairs = [(server.dial(proxy.port), server.take()) for _ in range(2)]
    proxy.upstream.faults = Faults(bandwidth_bytes_per_second=200_000)
    began = time.monotonic()
    threads = [send_all(client, PATTERN[:100_000]) for client, _ in pairs]
    for (_, target), thread in zip(pairs, threads, strict=True):
        assert read(target, 100_000) == PATTERN[:100_000]
        thread.join()
    assert 0.9 < time.monotonic() - began < 25
    # The way back has a bandwidth of its own.
    back = send_all(pairs[0][1], PATTERN)
    assert read(pairs[0][0], len(PATTERN)) == PATTERN
    back.join()


def test_what_is_on_its_way_is_bounded(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    proxy.upstream.faults = Faults(bandwidth_bytes_per_second=1)
    client.settimeout(0.5)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 64 << 20:  # far more than the kernel keeps
            sent += client.send(PATTERN)
    assert WINDOW_BYTES <= proxy.upstream.taken_bytes < WINDOW_BYTES + (64 << 10)
    proxy.upstream.faults = Faults()
    assert read(target, sent) == (PATTERN * (sent // len(PATTERN) + 1))[:sent]


def test_a_black_hole_is_one_way_and_loses_nothing(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    proxy.upstream.faults = Faults(black_hole=True)
    client.sendall(b"kept")
    client.shutdown(socket.SHUT_WR)
    target.sendall(b"through")
    assert read(client, 7) == b"through"
    wait_for(lambda: proxy.upstream.taken_bytes == 4, "taken")
    assert (proxy.upstream.delivered_bytes, proxy.open_connections) == (0, 1)
    target.setblocking(False)
    with pytest.raises(BlockingIOError):
        target.recv(1)
    target.settimeout(DEADLINE_SECONDS)
    proxy.upstream.faults = Faults()
    assert read(target, 4) == b"kept"
    assert target.recv(1) == b""


def corrupted(server: Server, seed: int) -> list[bytes]:
    """What arrives of the pattern's beginning by two connections, with every 100th byte wrong."""
    with FaultProxy(server.address, seed=seed) as proxy:
        proxy.upstream.faults = Faults(corrupt_every_bytes=100)
        arrived = []
        for _ in range(2):
            client, target = server.dial(proxy.port), server.take()
            client.sendall(PATTERN[:30])
            arrived.append(read(target, 30))
            client.sendall(PATTERN[30:1000])
            arrived[-1] += read(target, 970)
        wait_for(lambda: proxy.upstream.corrupted_bytes == 20, "counted")
        target.sendall(PATTERN[:1000])
        assert read(client, 1000) == PATTERN[:1000]
        return arrived


def test_corruption_changes_every_nth_byte_as_the_seed_says(server: Server) -> None:
    first = corrupted(server, 1)
    for one in first:
        assert [i for i in range(1000) if one[i] != PATTERN[i]] == list(range(99, 1000, 100))
    assert corrupted(server, 1) == first
    assert corrupted(server, 2) != first
    assert first[0] != first[1]


def test_reset_ends_every_connection_at_both_ends(server: Server, proxy: FaultProxy) -> None:
    pairs = [(server.dial(proxy.port), server.take()) for _ in range(2)]
    proxy.upstream.faults = Faults(black_hole=True)
    proxy.reset()
    assert proxy.open_connections == 0
    for pair in pairs:
        for end in pair:
            reset_at(end)
    proxy.upstream.faults = Faults()
    client, target = server.dial(proxy.port), server.take()
    client.sendall(b"again")
    assert read(target, 5) == b"again"


def test_half_close_ends_one_direction(
    proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, target = ends
    proxy.upstream.half_close()
    assert target.recv(1) == b""
    client.sendall(b"into the void")
    target.sendall(b"still")
    assert read(client, 5) == b"still"
    wait_for(lambda: proxy.upstream.taken_bytes == 13, "taken")
    assert proxy.upstream.delivered_bytes == 0
    client.close()
    target.close()
    wait_for(lambda: proxy.open_connections == 0, "over")


def test_refusing_leaves_connections_that_exist(server: Server, proxy: FaultProxy) -> None:
    client, target = server.dial(proxy.port), server.take()
    proxy.refuses = True
    with pytest.raises(ConnectionRefusedError):
        server.dial(proxy.port)
    client.sendall(b"there")
    assert read(target, 5) == b"there"


def test_refusing_ends_and_keeps_the_port_until_then(server: Server, proxy: FaultProxy) -> None:
    proxy.refuses = True
    assert proxy.refuses
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", proxy.port))
    proxy.refuses = False
    assert not proxy.refuses
    server.dial(proxy.port).sendall(b"new")
    assert read(server.take(), 3) == b"new"


def test_where_nobody_listens_a_connection_is_reset(server: Server, proxy: FaultProxy) -> None:
    server.close()
    with pytest.raises(ConnectionResetError):
        server.dial(proxy.port).recv(1)


def test_closing_ends_connections_and_thread(server: Server) -> None:
    before = threading.active_count()
    proxy = FaultProxy(server.address)
    client, target = server.dial(proxy.port), server.take()
    proxy.close()
    proxy.close()
    reset_at(client)
    reset_at(target)
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        server.dial(proxy.port)
    with pytest.raises(TransportClosed):
        proxy.upstream.faults = Faults()


def test_a_port_that_is_taken_is_refused(server: Server, proxy: FaultProxy) -> None:
    for port in (server.address[1], proxy.port):
        with pytest.raises(ListenRefused, match=rf"127.0.0.1:{port}: .*; port=0 takes a free one"):
            FaultProxy(server.address, port=port)


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_seconds": -1.0},
        {"latency_seconds": math.nan},
        {"latency_seconds": math.inf},
        {"bandwidth_bytes_per_second": 0.0},
        {"corrupt_every_bytes": -1},
    ],
)
def test_faults_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted a finite latency"):
        Faults(**wrong)
