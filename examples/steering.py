"""Move a layer along a direction, and see what the model says then.

The direction is the difference of two prompts' mean activations, computed in the same trace: no
activation travels to this process.
"""

import glasshive
from glasshive.models import fetch_smollm2

model = glasshive.local(fetch_smollm2(), cuts=(10, 20))
layer = model.model.layers[12]
prompt = "The most dangerous animal in the world is the"

with model.trace() as tracer:
    with tracer.invoke("The fish swam in the deep blue ocean."):
        sea = layer.output.mean(1)
    with tracer.invoke("The man walked in the busy old town."):
        town = layer.output.mean(1)
    with tracer.invoke(prompt):
        before = glasshive.save(model.lm_head.output[0, -1].softmax(-1).topk(5))
    with tracer.invoke(prompt):
        layer.output += 1.5 * (sea - town)
        after = glasshive.save(model.lm_head.output[0, -1].softmax(-1).topk(5))

for title, (probabilities, tokens) in (("before", before), ("after", after)):
    words = (model.tokenizer.decode(token).strip() for token in tokens)
    shown = (f"{word} {chance:.3f}" for word, chance in zip(words, probabilities, strict=True))
    print(f"{title:>6}: {', '.join(shown)}")
