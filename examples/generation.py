"""Steer a generation at every step, and see at which depth each of its words was settled.

The direction is the difference of two prompts' mean activations. It is made in invokes of their
own, one token long, and used at all steps of a third: no activation travels to this process.
"""

import torch

import glasshive
from glasshive.models import fetch_smollm2

model = glasshive.local(fetch_smollm2(), cuts=(10, 20))
layers, norm, head = model.model.layers, model.model.norm, model.lm_head
depths = (9, 19, 24, 29)
settled = []

with model.generate(max_new_tokens=1) as tracer:
    with tracer.invoke("The fish swam in the deep blue ocean."):
        sea = layers[12].output.mean(1)
    with tracer.invoke("The man walked in the busy old town."):
        town = layers[12].output.mean(1)
    with tracer.invoke("My favourite place is", max_new_tokens=12):
        for _ in tracer.iter[:]:
            layers[12].output += 0.5 * (sea - town)
            lens = [head(norm(layers[depth].output[:, -1])) for depth in depths]
            settled.append(glasshive.save(torch.stack(lens, 1).argmax(-1)))

print(tracer.text[-1])
print("step", *(f"after block {depth}" for depth in depths), sep=" | ")
for step, tokens in enumerate(settled):
    print(f"{step:>4}", *(repr(model.tokenizer.decode(token)) for token in tokens[0]), sep=" | ")
