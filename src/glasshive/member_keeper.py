"""Keeps a peer of a private swarm a member, and others out who were thrown out, while it runs.

Every few seconds it asks bootstrap peers for lists of revocations; an issuer also looks into its
own book, which `glasshive revoke` may have changed. A certificate is renewed by its issuer well
before it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, final

import structlog

from glasshive.dht.errors import ShutOut, SwarmError
from glasshive.dht.issuing import ask_to_renew, serve_issuer
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.revocation_lists import (
    EXCHANGE_SECONDS,
    fetch_revocations,
    serve_revocations,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.good_answer import good_answer
from glasshive.security.errors import NotAMember, SecurityError
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import renew_request
from glasshive.security.keys import Identity
from glasshive.security.membership import (
    ID_BYTES,
    USUAL_CERTIFICATE_SECONDS,
    Certificate,
)
from glasshive.settings import Settings
from glasshive.swarm_members import member_files
from glasshive.swarm_trust import read_root

# Of the standard library underneath: in a client's own script it is for that to say what is shown.
log = structlog.wrap_logger(logging.getLogger(__name__))

PERIOD_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 5.0
RENEW_TRY_SECONDS: Final = 60.0  # between two tries, while the issuer is away
_RENEW_LEFT: Final = 0.5  # of a certificate's usual life: two failed weekends don't end a host's


@final
class MemberKeeper:
    """Keeps `gate` current over `transport`. An async context manager.

    `keep` is called with each new certificate before it is used. With a `book` this peer is an
    issuer, which renews its own.
    """

    def __init__(
        self,
        transport: Transport,
        gate: MemberGate,
        identity: Identity,
        bootstraps: Sequence[PeerAddress],
        keep: Callable[[bytes], None],
        *,
        book: InviteBook | None = None,
        period_seconds: float = PERIOD_SECONDS,
        warn_shut_out: bool = True,
    ) -> None:
        self._warn_shut_out = warn_shut_out
        self._transport = transport
        self._gate = gate
        self._identity = identity
        self._bootstraps = [one for one in bootstraps if one.peer_id != transport.peer_id]
        self._keep = keep
        self._book = book
        self._period_seconds = period_seconds
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tried_at_seconds = 0.0
        self._said: dict[str, str] = {}

    async def start(self) -> None:
        """Returns when the bootstrap peers were asked once; goes on in tasks of its own.

        It doesn't wait for those that are silent while another has answered well. What they say
        later counts as soon as they do.
        """
        await serve_revocations(self._transport, self._gate)
        if self._book is not None:
            await self._look_into(self._book)
        answers = self._asked()
        first = asyncio.create_task(self._end_round(answers))
        self._tasks = {*answers, first, asyncio.create_task(self._keep_asking(first))}
        try:
            await good_answer(answers, [first])
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop. Never raises; may be called again."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    async def _keep_asking(self, first: asyncio.Task[None]) -> None:
        """Round after round; the first one was begun at the start."""
        current: Awaitable[None] = first
        while True:
            try:
                await current
            except Exception:
                log.exception("membership_round_failed")  # a bug of ours must not end the others
            await asyncio.sleep(self._period_seconds)
            current = self._round()

    async def _round(self) -> None:
        if self._book is not None:
            await self._look_into(self._book)
        await self._end_round(self._asked())

    def _asked(self) -> list[asyncio.Task[bool]]:
        """All bootstrap peers, each in a task that says whether it answered."""
        return [asyncio.create_task(self._ask(one)) for one in self._bootstraps]

    async def _end_round(self, answers: Sequence[asyncio.Task[bool]]) -> None:
        await asyncio.gather(*answers)
        with self._saying("revocations"):
            await asyncio.to_thread(self._gate.membership.save)
        await self._renew()

    async def _look_into(self, book: InviteBook) -> None:
        """Put in force what this issuer itself has revoked since."""
        with self._saying("the book"):
            signed = await asyncio.to_thread(book.revocations)
            if signed is not None and self._gate.learn(signed):
                log.info("revocations_changed")

    async def _ask(self, bootstrap: PeerAddress) -> bool:
        """Whether it answered."""
        has_answered = False
        with self._saying(bootstrap.peer_id):
            if await fetch_revocations(self._transport, bootstrap, self._gate, EXCHANGE_SECONDS):
                log.info("revocations_changed", by=bootstrap.peer_id)
            has_answered = True
        return has_answered

    async def _renew(self) -> None:
        """A new certificate, if it is time and the issuer of the last one can be asked."""
        now = self._transport.now()
        with self._saying("renewing"):
            held = Certificate.verify(
                self._gate.certificate,
                peer_id=self._identity.peer_id,
                swarm=self._gate.membership.swarm,
                issuers=self._gate.membership.issuers,
                now=None,  # one that ended while this machine slept is renewed, too
            )
            left_seconds = held.expires_at_seconds - now
            if left_seconds >= _RENEW_LEFT * USUAL_CERTIFICATE_SECONDS[held.role]:
                return
            # A clock that was ahead at the last try doesn't count.
            if 0 <= now - self._tried_at_seconds < RENEW_TRY_SECONDS:
                return
            self._tried_at_seconds = now
            certificate = await self._renewed(held, now)
            if certificate is None:
                return
            await asyncio.to_thread(self._keep, certificate)
            self._gate.certificate = certificate
            log.info("certificate_renewed")

    async def _renewed(self, held: Certificate, now: float) -> bytes | None:
        """What the issuer gives for `held`, checked; None if nobody here knows where it is."""
        if self._book is not None and held.issuer == self._identity.peer_id:
            return await asyncio.to_thread(self._book.enrol, held.member, held.role, now)
        issuer = next((one for one in self._bootstraps if one.peer_id == held.issuer), None)
        if issuer is None:
            log.warning("issuer_is_no_bootstrap", issuer=held.issuer)
            return None
        request = renew_request(
            self._gate.certificate,
            self._identity,
            swarm=held.swarm,
            issuer=held.issuer,
            request_id=secrets.token_bytes(ID_BYTES),
            now=now,
        )
        data = await ask_to_renew(self._transport, issuer, request, EXCHANGE_SECONDS)
        new = Certificate.verify(
            data, peer_id=held.member, swarm=held.swarm, issuers=(held.issuer,), now=now
        )
        if new.role is not held.role:
            raise NotAMember(f"got a certificate as {new.role} for one as {held.role}")
        return data

    @contextlib.contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        """Log what fails inside, once for each failure in a row."""
        said = ""
        try:
            yield
        except (SwarmError, SecurityError) as error:
            said = str(error)
            silent = isinstance(error, ShutOut) and not self._warn_shut_out
            if self._said.get(what) != said and not silent:
                log.warning("membership_not_kept", about=what, error=said)
        self._said[what] = said

    async def __aenter__(self) -> MemberKeeper:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


@contextlib.asynccontextmanager
async def keep_member(
    settings: Settings,
    transport: Transport,
    gate: MemberGate | None,
    identity: Identity,
    book: InviteBook | None = None,
    period_seconds: float = PERIOD_SECONDS,
    warn_shut_out: bool = True,
) -> AsyncIterator[None]:
    """Inside it, `transport` stays a member of the configured swarm, if that is private.

    An issuer, who has a `book`, answers those who join. Who would not `warn_shut_out` says in
    other words that it isn't let in any more. Raises ConfigError.
    """
    files = member_files(settings)
    if gate is None or files is None or settings.root is None:
        yield
        return
    if book is not None:
        await serve_issuer(transport, book, read_root(settings.root))
    keeper = MemberKeeper(
        transport,
        gate,
        identity,
        [PeerAddress.parse(one) for one in settings.bootstraps],
        partial(files.keep_certificate, identity.peer_id),
        book=book,
        period_seconds=period_seconds,
        warn_shut_out=warn_shut_out,
    )
    async with keeper:
        yield
