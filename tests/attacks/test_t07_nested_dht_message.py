"""T7: a small nested message must not kill a DHT process.

The victim is a real DHTNode in a process of its own. The attacker speaks hivemind's own store
call and sends an array nested in extension types as the value. Without the bounded decoder the
victim dies of a segmentation fault.
"""

import asyncio
import subprocess
import sys
import textwrap

import msgpack
import pytest

# hivemind 1.1 itself: at import, and at the start of its daemon.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]
VICTIM = """
import asyncio, sys
from glasshive.dht import serializer
if sys.argv[1] == "bounded":
    serializer.install()
    serializer.install()
from hivemind.dht.node import DHTNode

async def main():
    node = await DHTNode.create(
        host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, use_relay=False,
        startup_timeout=60,
    )
    print((await node.get_visible_maddrs())[0], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await node.shutdown()

asyncio.run(main())
"""


LEVELS = 400  # about 2 kB; each level costs the stock decoder some 40 kB of C stack


def nested_message(levels: int) -> bytes:
    data: bytes = msgpack.packb([])
    for _ in range(levels):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    return data


async def attack(address: str) -> tuple[str, bool]:
    """(the error that the victim gave back, whether it answers a ping afterwards)."""
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
    from hivemind.proto import dht_pb2
    from hivemind.utils.timed_storage import get_dht_time

    p2p = await P2P.create([address], nat_port_map=False, use_relay=False, startup_timeout=60)
    try:
        protocol = await DHTProtocol.create(p2p, DHTID.generate(), 20, 5, 5, 3, client_mode=True)
        victim = PeerID.from_base58(address.rsplit("/", 1)[1])
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate().to_bytes()],
            subkeys=[DHTProtocol.IS_DICTIONARY],
            values=[nested_message(LEVELS)],
            expiration_time=[get_dht_time() + 30],
            in_cache=[False],
            peer=protocol.node_info,
        )
        try:
            await asyncio.wait_for(protocol.get_stub(victim).rpc_store(request), timeout=10)
            error = ""
        except (TimeoutError, P2PHandlerError, P2PDaemonError) as caught:
            error = repr(caught)
        answers = await asyncio.wait_for(protocol.call_ping(victim), timeout=10)
        return error, answers is not None
    finally:
        await asyncio.wait_for(p2p.shutdown(), timeout=10)


def run_victim(mode: str) -> tuple[int, str, bool]:
    """(exit code of the victim, the error the attacker saw, whether it answered afterwards)."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(VICTIM), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as victim:
        try:
            assert victim.stdin is not None
            assert victim.stdout is not None
            address = victim.stdout.readline().strip()
            assert address.startswith("/ip4/127.0.0.1/"), "the victim did not start"
            error, answers = asyncio.run(attack(address))
            victim.stdin.close()
            return victim.wait(timeout=20), error, answers
        finally:
            victim.kill()


def test_the_bounded_decoder_survives_and_answers() -> None:
    exit_code, error, answers = run_victim("bounded")
    assert "nested too deep" in error
    assert answers
    assert exit_code == 0


def test_the_stock_decoder_dies_of_it() -> None:
    # Keeps the test above honest: the message is one that kills.
    exit_code, error, answers = run_victim("stock")
    assert exit_code == -11
    assert "nested too deep" not in error
    assert not answers
