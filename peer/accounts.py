"""What clients' traces take of a host: held against their quotas, and written to the audit log.

Either may be missing: quotas come with the certificates of a private swarm, and the log where the
host's owner wants one. Every trace has an account from its `Prepare` on, which is settled when the
trace has ended **and** the device has left it: who cancels pays for the kernel that still runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, final

from glasshive.dht.member_gate import MemberGate
from glasshive.graph.budget import Bill
from glasshive.graph.errors import GlasshiveError
from glasshive.graph.plan import Part
from glasshive.peer.errors import Busy, HostFailed, TraceEnded
from glasshive.peer.quotas import QuotaHold, Quotas
from glasshive.security.audit_entry import AuditEntry
from glasshive.security.audit_log import AuditLog
from glasshive.security.keys import PeerId
from glasshive.security.membership import Act, Certificate

DONE: Final = "done"
KILLED: Final = "killed"


@final
class Accounts:
    """The accounts of one host. `clock` gives seconds since 1970.

    `gate` knows the members of a private swarm, and comes with `quotas`.
    """

    def __init__(
        self,
        *,
        gate: MemberGate | None = None,
        quotas: Quotas | None = None,
        audit_log: AuditLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.audit_log = audit_log
        self.clock = clock
        self._gate = gate
        self._quotas = quotas

    def open(self, client: PeerId, trace_id: bytes) -> Account:
        """The account of a trace; a context manager, inside which the trace is.

        Raises NotAMember, QuotaExceeded, and Busy while the audit log can't take another entry.
        """
        certificate = self._gate and self._gate.certificate_of(client, Act.TRACE)
        if self.audit_log is not None and not self.audit_log.reserve():
            raise Busy(
                "this host can't write its audit log, and runs nothing that it couldn't write "
                "down; try another peer, or tell its owner"
            )
        hold = None
        try:
            if self._quotas is not None and certificate is not None:
                hold = self._quotas.begin(client, certificate.quota)
        except BaseException:
            if self.audit_log is not None:
                self.audit_log.release()
            raise
        return Account(self, client, trace_id, certificate, hold)

    def close(self) -> None:
        """Write what is to be kept, also of traces that end now, within some seconds. Blocks."""
        if self.audit_log is not None:
            self.audit_log.close()
        if self._quotas is not None:
            self._quotas.close()


@dataclass(frozen=True, slots=True)
class _Part:
    """What the audit log says of a part."""

    model_id: str
    dtype: str
    blocks: str
    sha256: bytes
    nodes: int


@final
class Account:
    """What one trace takes. Its methods may be called from any thread."""

    def __init__(
        self,
        accounts: Accounts,
        client: PeerId,
        trace_id: bytes,
        certificate: Certificate | None,
        hold: QuotaHold | None,
    ) -> None:
        self.compute_seconds = 0.0
        self.saved_bytes = 0
        self._accounts = accounts
        self._client = client
        self._trace_id = trace_id
        self._certificate = certificate
        self._hold = hold
        self._lock = threading.Lock()
        self._part: _Part | None = None
        self._computing = False
        self._outcome = ""

    def admit(self, part: Part, bill: Bill, *, model_id: str, dtype: str, sha256: bytes) -> None:
        """The part, of bytes with that hash, was checked, and is thought to take what `bill` says.

        From now on it is written down. Raises QuotaExceeded if its member has not so much left.
        """
        blocks = f"{part.span.start}:{part.span.end}"
        self._part = _Part(model_id, dtype, blocks, sha256, len(part.graph))
        if self._hold is not None:
            self._hold.reserve(bill.seconds, bill.saved_bytes)
        if self._accounts.audit_log is not None:
            self._accounts.audit_log.begin(self._entry(KILLED, self._part))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside it, the device works for the trace. Raises TraceEnded if the trace has ended."""
        with self._lock:
            if self._outcome:
                raise TraceEnded("the trace has ended")
            self._computing = True
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.compute_seconds += time.perf_counter() - began
                self._computing = False
                ended = bool(self._outcome)
            if ended:
                self._settle()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside it, within `computing`, the device may work for others."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.compute_seconds -= time.perf_counter() - began

    def saved(self, n_bytes: int) -> None:
        """So much was made for the client; to be called while `computing`."""
        self.saved_bytes += n_bytes

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._outcome = _outcome(kind)
            computing = self._computing
        if not computing:
            self._settle()

    def _settle(self) -> None:
        """Once, when the trace has ended and nothing computes for it."""
        if self._hold is not None:
            self._hold.settle(self.compute_seconds, self.saved_bytes)
        log = self._accounts.audit_log
        if log is None:
            return
        if self._part is None:
            log.release()
        else:
            log.append(self._entry(self._outcome, self._part))

    def _entry(self, outcome: str, part: _Part) -> AuditEntry:
        certificate = self._certificate
        return AuditEntry(
            time_milliseconds=round(self._accounts.clock() * 1000),
            client=self._client,
            role="" if certificate is None else certificate.role.value,
            invite=b"" if certificate is None else certificate.invite,
            trace_id=self._trace_id,
            model_id=part.model_id,
            dtype=part.dtype,
            blocks=part.blocks,
            graph_sha256=part.sha256,
            nodes=part.nodes,
            outcome=outcome,
            compute_milliseconds=round(self.compute_seconds * 1000),
            saved_bytes=self.saved_bytes,
        )


def _outcome(kind: type[BaseException] | None) -> str:
    """ "done", or the name of an error as a client would hear it."""
    if kind is None:
        return DONE
    if issubclass(kind, GlasshiveError):
        return kind.__name__
    return (HostFailed if issubclass(kind, Exception) else TraceEnded).__name__
