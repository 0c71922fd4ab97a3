"""What can go wrong at the client.

GlasshiveError
└── ClientError                 whatever the client raises on purpose
    ├── NotSaved                a traced value used after its trace, which was never saved
    ├── NotInATrace             a site, or a module's weights, used outside a trace
    ├── BadPrompt               a prompt that is no text and no token ids
    ├── NoRoute                 no chain of peers covers the blocks that a trace needs
    ├── BadModelFiles           a configuration or tokenizer that does not fit the model's id
    ├── TraceTimeout            the trace's deadline passed
    ├── TraceCancelled          it was cancelled by `tracer.cancel()`
    ├── TokensDiffer            a generation run again made other tokens than a streamer has
    ├── PeerError               one peer of the route is to blame
    │   ├── PeerLost            it cannot be reached, or was lost on the way
    │   ├── PeerBusy            it has as much to do as it allows
    │   ├── PeerFailed          it refused its part, or failed in it, and said why
    │   └── BadAnswer           its answer breaks the protocol or the plan
    └── TraceError              the body of a trace asks for something that no graph can say
        ├── DataDependent       Python asked for a number, or for a shape that depends on numbers
        ├── PlainDestination    a traced value is written into a tensor that is not traced
        ├── OutOfSight          memory, storage or another library that tracing cannot see into
        ├── AmbientState        a torch mode in force that would change what is recorded
        ├── NotInTable          a torch function outside the op table (also an UnknownOp)
        └── Misfit              arguments that torch refuses (also a ShapeMismatch)

The text of a TraceError starts with the user's own file and line.
"""

from __future__ import annotations

from typing import Final

from glasshive.client.source_lines import SourceLine
from glasshive.graph.errors import GlasshiveError, ShapeMismatch, UnknownOp
from glasshive.graph.plan import Span
from glasshive.security.keys import PeerId


class ClientError(GlasshiveError):
    """Whatever the client raises on purpose."""


class NotSaved(ClientError):
    """A traced value was used after its trace, and was never saved."""


class TraceError(ClientError):
    """The body of a trace asks for something that no graph can say.

    `line` is where in the user's code; None if no user code is on the stack.
    """

    def __init__(self, message: str, *, line: SourceLine | None = None) -> None:
        super().__init__(f"{line}: {message}" if line is not None else message)
        self.line = line


class DataDependent(TraceError):
    """Python asked for a number, or for a shape that depends on numbers, before they exist."""


class PlainDestination(TraceError):
    """A traced value is written into a tensor that is not traced."""


class OutOfSight(TraceError):
    """Memory, storage or another library that tracing cannot see into."""


class AmbientState(TraceError):
    """A torch mode is in force that would change what is recorded."""


class NotInTable(TraceError, UnknownOp):
    """A torch function outside the op table."""

    def __init__(self, message: str, *, line: SourceLine | None = None) -> None:
        TraceError.__init__(self, message, line=line)
        self.node = None


class Misfit(TraceError, ShapeMismatch):
    """Arguments that torch refuses."""

    def __init__(self, message: str, *, line: SourceLine | None = None) -> None:
        TraceError.__init__(self, message, line=line)
        self.node = None


class NoRoute(ClientError):
    """No chain of peers covers the blocks that a trace needs."""


class BadModelFiles(ClientError):
    """A configuration or tokenizer that does not fit the model's id, or that no release knows."""


class BadPrompt(ClientError):
    """A prompt that is no text, no token ids, and no tokenizer's answer."""


class TraceTimeout(ClientError):
    """The trace's deadline passed."""


class TraceCancelled(ClientError):
    """The trace was cancelled by `tracer.cancel()`."""


class TokensDiffer(ClientError):
    """A generation that was run again made other tokens than its streamer had been given."""


class NotInATrace(ClientError):
    """A site or a module's weights were used outside a trace."""


class PeerError(ClientError):
    """One peer of the route is to blame. `peer` is its id."""

    def __init__(self, message: str, *, peer: PeerId) -> None:
        super().__init__(message)
        self.peer = peer


class PeerLost(PeerError):
    """A peer that cannot be reached, or was lost while it ran its part.

    One that `is_there` had only ended too early: it may run the part again.
    """

    def __init__(self, message: str, *, peer: PeerId, is_there: bool = False) -> None:
        super().__init__(message, peer=peer)
        self.is_there = is_there


class PeerBusy(PeerError):
    """A peer that runs as many traces as it allows."""


class BadAnswer(PeerError):
    """A peer whose answer breaks the protocol or the plan."""


_OWN_FAULTS: Final = frozenset({"HostFailed", "NotEnoughMemory", "NotServed"})
_OUTDATED: Final = frozenset({"NotServed", "RecordRefused"})


class PeerFailed(PeerError):
    """A peer that refused its part, or failed in it, and said why.

    `code` is the name of the error there, `node` the node to blame.
    """

    def __init__(
        self, message: str, *, code: str, node: int | None, peer: PeerId, span: Span
    ) -> None:
        super().__init__(message, peer=peer)
        self.code = code
        self.node = node
        self.span = span

    @property
    def is_own_fault(self) -> bool:
        """Whether the peer is to blame, and not the graph: another one may well run its part."""
        return self.code in _OWN_FAULTS

    @property
    def is_outdated(self) -> bool:
        """Whether what was known of it, or of those that it sends to, was out of date."""
        return self.code in _OUTDATED
