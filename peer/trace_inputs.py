"""What a client sends a peer once all have accepted: the tokens of each prompt, then `Run`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glasshive.dht.messages import Cancel, Input, Run, decode, spec_of
from glasshive.dht.tensor_frames import receive_tensor
from glasshive.graph.kernels import tensor_from_bytes
from glasshive.graph.order import Passes
from glasshive.peer.client_stream import ClientStream
from glasshive.peer.errors import TraceEnded, WrongInput
from glasshive.peer.generation import PassInputs

__all__ = ["take_inputs"]


async def take_inputs(
    client: ClientStream,
    passes: Passes,
    vocabulary_tokens: int,
    left_seconds: Callable[[], float],
) -> tuple[dict[int, PassInputs], int]:
    """The inputs by pass, and how many of the part's saves the client has already.

    Raises WrongInput for tensors that no pass can run on, TraceEnded if the client cancels, and
    what a stream raises.
    """
    taken: dict[int, dict[str, Tensor]] = {}
    while True:
        # The client waits meanwhile for the other peers, to whom it may have much to send.
        frame = await client.receive(left_seconds())
        message = decode(frame.header, Input, Run, Cancel)
        if isinstance(message, Cancel):
            raise TraceEnded("the client cancelled the trace")
        if isinstance(message, Run):
            break
        spec = spec_of(message.dtype, message.shape)
        one = next(iter(passes.passes[message.pass_index : message.pass_index + 1]), None)
        mine = taken.setdefault(message.pass_index, {})
        if (
            one is None
            or one.step
            or message.name not in ("input_ids", "attention_mask", "position_ids")
            or message.name in mine
            or (spec.dtype.value, spec.shape) != ("int64", (one.batch, one.past + one.seq))
        ):
            raise WrongInput(f"input {message.name[:20]!r} of {spec} fits no pass of this plan")
        data = await receive_tensor(client, frame, spec, left_seconds())
        mine[message.name] = tensor_from_bytes(spec, data)
    inputs = {index: _checked(named, vocabulary_tokens) for index, named in taken.items()}
    return inputs, message.known_saves


def _checked(named: dict[str, Tensor], vocabulary_tokens: int) -> PassInputs:
    ids = named.get("input_ids")
    if ids is not None and bool(((ids < 0) | (ids >= vocabulary_tokens)).any()):
        raise WrongInput(f"a token id outside the vocabulary of {vocabulary_tokens}")
    mask = named.get("attention_mask")
    if mask is not None and bool(((mask != 0) & (mask != 1)).any()):
        raise WrongInput("an attention mask that holds more than 0 and 1")
    positions = named.get("position_ids")
    if positions is not None and bool(((positions < 0) | (positions >= positions.shape[1])).any()):
        raise WrongInput("a position id outside its row")
    return PassInputs(**named)
