"""What would each layer say next? The logit lens, at the last position of a prompt.

Run it with `python examples/logit_lens.py`. The model is split over three spans in this process;
on a swarm everything but the line that makes `model` stays as it is:

    model = glasshive.connect("hive.toml").model("SmolLM2-135M-Instruct")
"""

import torch

import glasshive
from glasshive.models import fetch_smollm2

model = glasshive.local(fetch_smollm2(), cuts=(10, 20))

with model.trace("The Eiffel Tower is in the city of") as tracer:
    rows = []
    for layer in model.model.layers:
        logits = model.lm_head(model.model.norm(layer.output[:, -1]))
        rows.append(logits.softmax(-1)[0])
    probabilities, tokens = glasshive.save(torch.stack(rows).max(-1))

for layer, (probability, token) in enumerate(zip(probabilities, tokens, strict=True)):
    print(f"{layer:2}  {probability:5.2f}  {model.tokenizer.decode(token)!r}")
print(f"{tracer.result.received_bytes} bytes came back from {len(tracer.result.hops)} peers")
