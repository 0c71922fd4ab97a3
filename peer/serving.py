"""A host on a transport: it answers traces, is found through the directory, and leaves cleanly."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import torch

from glasshive.dht.announcer import Announcer
from glasshive.dht.directory import serve_directory
from glasshive.dht.records import MAX_LIFETIME_SECONDS, ModelId, PeerRecord
from glasshive.dht.transport import Transport
from glasshive.graph.kernels import from_torch_dtype
from glasshive.peer.accounts import Accounts
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import Identity
from glasshive.security.policy import Policy


class Serving:
    """One served span, announced until `close`. An async context manager."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        served: ServedModel,
        *,
        limits: HostLimits | None = None,
        policy: Policy | None = None,
        seen: SeenRequests | None = None,
        accounts: Accounts | None = None,
        lifetime_seconds: float = MAX_LIFETIME_SECONDS,
    ) -> None:
        self.host = Host(
            *(transport, identity, served),
            limits=limits,
            policy=policy,
            seen=seen,
            accounts=accounts,
        )
        self._transport = transport
        self._pace = served.pace
        version = self.host.policy.version
        self.record = record_of(transport, served, lifetime_seconds, version)
        self._announcer = Announcer(transport, identity, self.record, lifetime_seconds)

    async def start(self) -> None:
        """Answer traces and directory requests, then announce. Raises what announcing raises."""
        await self.host.start()
        await serve_directory(self._transport)
        await self._announcer.start()

    def apply(self, policy: Policy) -> None:
        """Keep to `policy` from the next admission on, and announce its version.

        What is announced is withdrawn for as long as the policy doesn't allow the model.
        """
        self.host.apply(policy)
        self.refresh()

    def refresh(self, *, again: bool = False) -> None:
        """Announce what has changed of the record; all of it with `again`.

        How fast this host computes is corrected by what it runs, often by a little: a change by a
        tenth counts.
        """
        pace, told = self._pace, self.record
        if (
            pace.tokens_per_second > 1.1 * told.throughput_tokens_per_second
            or pace.pass_seconds < 0.9 * told.pass_seconds
        ):
            told = replace(
                told,
                throughput_tokens_per_second=pace.tokens_per_second,
                pass_seconds=pace.pass_seconds,
            )
        record = replace(
            told,
            addresses=self._transport.addresses,
            load=round(self.host.load, 2),
            whitelist_version=self.host.policy.version,
            withdrawn=not self.host.policy.allows_model(self.record.model),
        )
        if again or record != self.record:
            self.record = record
            self._announcer.update(record)

    async def close(self) -> None:
        """Withdraw the record, so that no client comes any more, and stop what runs."""
        await self._announcer.close()
        self.host.close()

    async def __aenter__(self) -> Serving:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def record_of(
    transport: Transport, served: ServedModel, lifetime_seconds: float, whitelist_version: int
) -> PeerRecord:
    """What this host announces of itself, with a measured speed."""
    model = served.model
    return PeerRecord(
        model=ModelId(served.manifest.model_id),
        model_name=served.name,
        start=model.start,
        end=model.end,
        n_blocks=model.n_blocks,
        dtype=from_torch_dtype(model.dtype).value,
        backend=backend_class(model.device),
        attention=served.attention,
        throughput_tokens_per_second=served.pace.tokens_per_second,
        pass_seconds=served.pace.pass_seconds,
        addresses=transport.addresses,
        whitelist_version=whitelist_version,
        load=0.0,
        software_version=importlib.metadata.version("glasshive"),
        peer_id=transport.peer_id,
        expires_at_seconds=transport.now() + lifetime_seconds,
    )


def backend_class(device: torch.device) -> str:
    """Hardware and torch, within which results are bit-equal: `cpu torch-2.13`."""
    version = ".".join(torch.__version__.split(".")[:2])
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind} torch-{version}"
