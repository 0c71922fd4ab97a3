"""What a part of a trace is sent by others: which values, in which form, and what has come of it.

The plan says all of it before anything comes; whatever else comes breaks the protocol.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias, final

from torch import Tensor

from glasshive.dht.errors import MalformedMessage
from glasshive.dht.framing import Stream
from glasshive.dht.messages import Dropped, Value, decode, spec_of
from glasshive.dht.tensor_frames import receive_tensor
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor
from glasshive.graph.graph import NodeId
from glasshive.graph.order import Passes
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Stage
from glasshive.graph.tensors import TensorSpec
from glasshive.peer.memory_order import tensor_in_order

__all__ = ["AwaitedValues", "Key", "awaited_as", "too_early"]

Key: TypeAlias = tuple[NodeId, int | None]
"""A value that travels, and of hidden states and tokens, which every pass has, the pass in which
they were made."""


def awaited_as(value: NodeId, stage: Stage) -> Key:
    """By what a value that a stage imports is known."""
    return _key(value, stage.pass_index - (value == TOKENS))


def too_early(pass_index: int) -> str:
    """Why hidden states may not be dropped in a pass that runs in any case."""
    return f"hidden states of pass {pass_index} are dropped too early"


def _key(value: NodeId, pass_index: int) -> Key:
    return value, pass_index if value in (HIDDEN, TOKENS) else None


@final
class AwaitedValues:
    """The values of one part, from its beginning to its end. Belongs to the loop.

    None stands for a value that never comes.
    """

    def __init__(self, part: Part, passes: Passes, outline: Outline) -> None:
        self._part = part
        self._passes = passes
        self._outline = outline
        self._expected = {  # from whom, and for which pass
            awaited_as(value, stage): (sender, stage.pass_index)
            for stage in part.stages
            for value, sender in stage.imports
        }
        self._counts = Counter(sender for sender, _ in self._expected.values())
        loop = asyncio.get_running_loop()
        self._parked: dict[Key, asyncio.Future[Tensor | None]] = {
            key: loop.create_future() for key in self._expected
        }
        self.came: Counter[int] = Counter()
        """How many values have come, by the sender's part."""

    def count(self, sender: int) -> int:
        """How many values come from a part in all."""
        return self._counts[sender]

    def has_from(self, sender: int) -> bool:
        """Whether something from that part has not come yet, and is waited for."""
        return any(not parked.done() for _, parked in self._from(sender))

    def parked(self, key: Key) -> Awaitable[Tensor | None]:
        """Gives the value when it has come. Raises what `fail` was given for its sender."""
        return self._parked[key]

    def take(self, key: Key) -> None:
        """Whoever waited for it has it."""
        del self._parked[key]

    def left(self) -> list[tuple[int, Awaitable[Tensor | None]]]:
        """The values that nobody has taken, each with its sender's part."""
        return [(self._expected[key][0], parked) for key, parked in self._parked.items()]

    def park(self, sender: int, key: Key, value: Tensor | None) -> None:
        """The next value from that part has come."""
        parked = self._parked.get(key)
        if parked is not None and not parked.done():  # whoever waited may have been cancelled
            parked.set_result(value)
        self.came[sender] += 1

    def fail(self, sender: int, error: Exception) -> None:
        """Nothing more comes from that part."""
        for _, parked in self._from(sender):
            if not parked.done():
                parked.set_exception(error)
                parked.exception()  # whoever waits is told; nobody else has to be

    def clear(self) -> None:
        """Nothing is waited for any more."""
        self._parked.clear()

    async def receive(
        self,
        sender: int,
        stream: Stream,
        deadline_seconds: float,
        on_slice: Callable[[bytearray], None],
    ) -> tuple[Key, Tensor | None]:
        """The next value on a stream of that part, which is still to be parked.

        Raises MalformedMessage for what is not on the plan, and what `Stream.receive` raises.
        """
        frame = await stream.receive(deadline_seconds)
        message = decode(frame.header, Value, Dropped)
        value = NodeId(message.value)
        key = _key(value, message.pass_index)
        expected, needed_in = self._expected.get(key, (None, 0))
        parked = self._parked.get(key)
        if expected != sender or parked is None or parked.done():
            raise MalformedMessage(f"value {message.value} from part {sender} is not expected")
        if key[1] is None and (message.pass_index, sender) >= (needed_in, self._part.index):
            # What a stage imports was made before it: in an earlier pass, or by an earlier part.
            raise MalformedMessage(
                f"value {message.value} from part {sender} in pass {message.pass_index} comes "
                f"after part {self._part.index} needs it, in pass {needed_in}"
            )
        if isinstance(message, Dropped):
            if not self._passes.are_generation:
                raise MalformedMessage(f"value {value} is dropped, and nothing ends early")
            if value == HIDDEN and self._passes.passes[message.pass_index].step <= 0:
                raise MalformedMessage(too_early(message.pass_index))
            return key, None
        spec = spec_of(message.dtype, message.shape)
        wanted = self._spec(*key)
        if spec != wanted:
            raise MalformedMessage(
                f"value {message.value} from part {sender} is {spec}; {wanted} is on the plan"
            )
        data = await receive_tensor(stream, frame, spec, deadline_seconds, on_slice)
        try:
            tensor = tensor_in_order(spec, message.order, data)
        except BadTensor as error:
            raise MalformedMessage(f"value {value} from part {sender}: {error}") from error
        if value == TOKENS and not self._outline.are_tokens(tensor.tolist()):
            # On an accelerator an embedding of such a one would end the process.
            raise MalformedMessage(f"tokens of pass {message.pass_index} outside the vocabulary")
        return key, tensor

    def _from(self, sender: int) -> Iterator[tuple[Key, asyncio.Future[Tensor | None]]]:
        for key, parked in self._parked.items():
            if self._expected[key][0] == sender:
                yield key, parked

    def _spec(self, value: NodeId, pass_index: int | None) -> TensorSpec:
        if pass_index is None:
            return self._part.specs[value]
        one = self._passes.passes[pass_index]
        if value == TOKENS:
            return TensorSpec(DType.INT64, (one.batch,))
        return self._outline.hidden_spec(one.batch, one.seq)
