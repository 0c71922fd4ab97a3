"""A swarm of your own on this machine: a bootstrap and three hosts, as real processes.

The same as starting `glasshive bootstrap` and `glasshive serve MODEL --blocks A:B` by hand, and
what tests of your own can use.
"""

import glasshive
from glasshive.models import fetch_smollm2
from glasshive.testing import LocalSwarm

if __name__ == "__main__":
    spans = [(0, 10), (10, 20), (20, 30)]
    with LocalSwarm(fetch_smollm2(), spans) as hive, glasshive.connect(hive.config) as swarm:
        for record in swarm.records():
            print(f"blocks {record.start}:{record.end} of {record.model_name}: {record.peer_id}")

        model = swarm.model(hive.model_name)
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            model.model.layers[25].mlp.output[:, -1] = 0
            token = model.lm_head.output[0, -1].argmax().save()

        print(f"next token: {model.tokenizer.decode(token)!r}")
        for hop in tracer.result.hops:
            print(
                f"blocks {hop.blocks} at ...{hop.peer[-8:]}: computed for "
                f"{hop.compute_seconds:.3f} s, sent {hop.hidden_bytes} bytes on and "
                f"{hop.saved_bytes} bytes back"
            )
