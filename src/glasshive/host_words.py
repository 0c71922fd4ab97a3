"""What a host and a bootstrap peer tell whoever started them, as text or as events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import structlog
from pydantic import ByteSize

from glasshive.dht.addresses import is_beyond
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.security.policy import Policy
from glasshive.security.trust_store import TrustStore
from glasshive.terminal import console

if TYPE_CHECKING:
    from glasshive.dht.records import PeerRecord
    from glasshive.host_process import Life, ServeOptions
    from glasshive.peer.accounts import Accounts
    from glasshive.peer.serving import Serving

log = structlog.get_logger(__name__)


def say_starting(life: Life, options: ServeOptions, *, has_libraries: bool) -> None:
    """What a host does in the seconds, or minutes, before it serves."""
    model = options.name or options.model
    blocks = options.blocks and "{}:{}".format(*options.blocks)
    if life.log_format == "json":
        log.info("starting", model=model, blocks=blocks)
        return
    libraries = "" if has_libraries else "torch and transformers, then "
    which = f"blocks {blocks}" if blocks else "all blocks"
    console.print(f"starting: loading {libraries}{which} of {model}; Ctrl-C stops", markup=False)


def say_withdrawn(life: Life, record: PeerRecord, policy: Policy) -> None:
    """That the model may not be served any more, or again, and what this host does about it."""
    if life.log_format == "json":
        event = "model_not_allowed" if record.withdrawn else "model_allowed_again"
        log.warning(event, model=record.model_name, model_id=record.model, policy=policy.who)
        return
    if record.withdrawn:
        text = (
            f"{record.model_name} ({record.model}) may not be served any more by {policy.source}: "
            "the record is withdrawn and no trace is taken; it is announced again as soon as a "
            "whitelist has the model. Ctrl-C stops"
        )
    else:
        text = f"{record.model_name} may be served again by {policy.source}: it is announced again"
    console.print(text, markup=False)


def say_policy(life: Life, policy: Policy) -> None:
    """Exactly what others can and cannot run here, and who signed that."""
    if life.log_format == "json":
        log.info(
            "policy",
            policy=policy.who,
            whitelist_version=policy.version,
            signers=list(policy.signers),
            rules=policy.describe(),
        )
        return
    for line in policy.describe():
        console.print(line, markup=False, highlight=False)


def say_memory(life: Life, memory_bytes: int) -> None:
    """How much memory traces may take, and whether that is less than was wanted."""
    wanted = life.settings.memory
    is_less = wanted is not None and memory_bytes < wanted
    if life.log_format == "json":
        log.info("memory", memory_bytes=memory_bytes, wanted_bytes=wanted)
        return
    console.print(
        f"traces take at most {ByteSize(memory_bytes).human_readable()} of memory, all together"
        + (", since no more is free" if is_less else "")
    )


def say_audit_log(life: Life, accounts: Accounts) -> None:
    """That who runs what is written down here."""
    if accounts.audit_log is None:
        return
    folder = str(accounts.audit_log.folder)
    if life.log_format == "json":
        log.info("audit_log", folder=folder)
        return
    console.print(
        f"who runs which graph is written down in {folder}; `glasshive audit show` reads it",
        markup=False,
    )


def say_whitelist(life: Life, store: TrustStore) -> None:
    """Which whitelist a bootstrap peer, which runs nothing itself, has for others."""
    version = store.highest_version
    if life.log_format == "json":
        log.info("whitelist", version=version, root_version=store.root.version)
    elif version:
        console.print(f"hosts get whitelist {version} of the swarm from here", highlight=False)
    else:
        console.print(
            "no whitelist of the swarm was published yet, so its hosts allow reads and little "
            "else; who signs for it runs\n"
            "  glasshive whitelist publish --folder FOLDER",
            markup=False,
        )


def say_reach(life: Life, transport: HivemindTransport) -> None:
    """Who can come from other machines, and where: before this peer is announced."""
    addresses = [one for one in transport.addresses if is_beyond(one)]
    if not addresses:
        return
    members = bool(life.settings.issuers)
    if life.log_format == "json":
        log.warning("reachable", addresses=addresses, members_only=members)
        return
    who = "members of this swarm" if members else "strangers"
    console.print(
        f"other machines reach this one: {who} may ask it for what is allowed, under\n  "
        + "\n  ".join(addresses),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def say_moved(life: Life, transport: HivemindTransport) -> None:
    """That a bootstrap peer is named where it doesn't listen, so that nobody would find it."""
    settings, config = life.settings, life.config
    named = [one for one in settings.bootstraps if one.endswith(f"/p2p/{transport.peer_id}")]
    ports = [one.split("/")[3:5] for one in (*transport.addresses, *transport.listening)]
    if not named or any(one.split("/")[3:5] in ports for one in named):
        return
    address = transport.addresses[0]
    if life.log_format == "json":
        log.warning("moved", config=str(config), named=named, address=address)
        return
    corrected = dict.fromkeys(address if one in named else one for one in settings.bootstraps)
    old_invites = "; invites made before hold the old address, so make them anew"
    console.print(
        f"{config} names this peer at {', '.join(named)}, and it doesn't listen at that port: who "
        "looks for it there won't find it. In that file, and in its copies, write\n"
        f"  bootstraps = {json.dumps(list(corrected))}\n"
        "or start this peer at the port that is named" + (old_invites if settings.issuers else ""),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def say_alone(life: Life) -> None:
    """That a host without a bootstrap joins nobody: before it loads for minutes."""
    if life.settings.bootstraps:
        return
    if life.log_format == "json":
        log.warning("begins_a_swarm", swarm=life.settings.swarm)
        return
    console.print(
        "no bootstrap peer is given, so this host begins a swarm of its own, with nobody else in "
        "it; to join one that is there, stop this with Ctrl-C and add\n"
        "  --bootstrap ADDRESS\n"
        "where ADDRESS is what its `glasshive bootstrap` or `glasshive serve` printed",
        markup=False,
    )


def say_ready(life: Life, serving: Serving) -> None:
    record = serving.record
    if life.log_format == "json":
        log.info(
            "ready",
            model=record.model_name,
            model_id=record.model,
            blocks=f"{record.start}:{record.end}",
            n_blocks=record.n_blocks,
            dtype=record.dtype,
            backend=record.backend,
            attention=record.attention,
            tokens_per_second=round(record.throughput_tokens_per_second),
            pass_seconds=round(record.pass_seconds, 6),
            peer=record.peer_id,
            address=record.addresses[0],
            bootstraps=len(life.settings.bootstraps),
        )
        return
    console.print(
        f"serving [bold]{record.model_name}[/] blocks [bold]{record.start}:{record.end}[/] of "
        f"{record.n_blocks}: {record.dtype}, {record.attention} attention, {record.backend}, "
        f"{record.throughput_tokens_per_second:.0f} tokens/s, "
        f"{1000 * record.pass_seconds:.1f} ms for a pass of one\n"
        f"model   {record.model}\naddress {record.addresses[0]}"
    )
    if not life.settings.bootstraps:
        console.print(
            "other hosts and clients find the swarm that this host began by\n"
            f"  --bootstrap {record.addresses[0]}",
            markup=False,
            soft_wrap=True,
        )
    console.print("ready; Ctrl-C withdraws the record and stops")
