"""Which layers, at which token, carry the name? Activation patching with a minimal pair of prompts.

One trace for each token position: the clean prompt is one row of a forward pass, and 30 corrupted
prompts, each with another layer patched from the clean row, are the others.
"""

from typing import Any

import glasshive
from glasshive.models import fetch_smollm2

model = glasshive.local(fetch_smollm2(), cuts=(10, 20))
layers = model.model.layers

clean = "When Jack and Anna arrived at the beach, Anna threw the ball to"
corrupted = "When Jack and Anna arrived at the beach, Jack threw the ball to"
jack, anna = (model.tokenizer(name)["input_ids"][0] for name in (" Jack", " Anna"))
tokens = [model.tokenizer.decode(token) for token in model.tokenizer(clean)["input_ids"]]


def preference() -> Any:
    """How much the model prefers Jack to Anna as the next word, in the current invoke."""
    logits = model.lm_head.output[0, -1]
    return logits[jack] - logits[anna]


print("share of the clean answer that patching one layer at one token brings back")
for position in range(len(tokens)):
    with model.trace() as tracer:
        with tracer.invoke(clean):
            states = [layer.output[:, position] for layer in layers]
            best = preference().save()
        with tracer.invoke(corrupted):
            worst = preference().save()
        patched = []
        for layer, state in zip(layers, states, strict=True):
            with tracer.invoke(corrupted):
                layer.output[:, position] = state
                patched.append(preference().save())
    shares = [(value - worst) / (best - worst) for value in patched]
    print(f"{tokens[position]!r:>10}", *(f"{share:5.2f}" for share in shares[::3]))
