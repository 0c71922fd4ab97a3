"""Random experiments: traces that read, compute, edit, call, patch between invokes, and save."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from glasshive.graph.errors import NotASite
from glasshive.graph.order import NEVER, InvokeShape

HIDDEN = 32
BLOCKS = 4
VOCABULARY = 64
BLOCK_SITES = (
    ("", "input"),
    ("", "output"),
    ("mlp", "input"),
    ("mlp", "output"),
    ("self_attn", "output"),
    ("self_attn.o_proj", "input"),
    ("self_attn.o_proj", "output"),
    ("input_layernorm", "input"),
    ("input_layernorm", "output"),
    ("post_attention_layernorm", "input"),
)


class RandomTrace:
    """Writes one random trace on a model; `seed` decides everything about it."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.values: list[tuple[int, Any]] = []  # (sequence length, a traced [batch, seq, hidden])
        self.small: list[Any] = []
        self.saved: list[Any] = []

    def run(self) -> list[Any]:
        """Trace and run; what was saved. Raises GraphError for an order that cannot be had."""
        choose = self.random
        options: dict[str, Any] = {}
        if choose.random() < 0.15:
            options["batching"] = "alone"
        if choose.random() < 0.3:
            options["pass_rows"] = choose.choice([1, 2, 3])
        with self.model.trace(**options) as tracer:
            for _ in range(choose.choice([1, 1, 2, 2, 3, 4])):
                with tracer.invoke(self._prompt()):
                    self._body(tracer)
            if not self.saved:
                self._save(self.values[-1][1])
        return self.saved

    def _prompt(self) -> Any:
        choose = self.random
        batch = choose.choice([1, 1, 1, 2])
        seq = choose.choice([6, 6, 6, 6, 5])
        rows = [[choose.randrange(1, VOCABULARY) for _ in range(seq)] for _ in range(batch)]
        if batch == 2 and choose.random() < 0.3:
            rows[1] = rows[1][choose.randrange(1, 4) :]
        return rows

    def _body(self, tracer: Any) -> None:
        self.tracer = tracer
        self.shape: InvokeShape = tracer.sites.invokes[-1]
        self.values.append((self.shape.seq, self.model.model.embed_tokens.output))
        for _ in range(self.random.randrange(3, 11)):
            step = self.random.choices(
                [
                    self._read,
                    self._op,
                    self._write,
                    self._call,
                    self._param,
                    self._keep,
                    self._skip,
                ],
                weights=[3, 4, 5, 1, 1, 2, 0.3],
            )[0]
            try:
                step()
            except NotASite:  # inside what is skipped
                continue
        if self.random.random() < 0.7:
            self._save(self.model.lm_head.output[:, -1].topk(4).values)

    # Sites ---------------------------------------------------------------------------------------

    def _module(self) -> tuple[Any, str]:
        choose = self.random
        where = choose.random()
        if where < 0.08:
            return self.model.model.embed_tokens, "output"
        if where < 0.16:
            return self.model.model.norm, choose.choice(["input", "output"])
        if where < 0.2:
            return self.model.lm_head, "input"
        module = self.model.model.layers[choose.randrange(BLOCKS)]
        part, io = choose.choice(BLOCK_SITES)
        for name in filter(None, part.split(".")):
            module = getattr(module, name)
        return module, io

    def _get(self, module: Any, io: str) -> Any:
        found = getattr(module, io)
        return found[0] if isinstance(found, tuple) else found

    def _read(self) -> None:
        if self.random.random() < 0.1:
            module = self.model.model.layers[self.random.randrange(BLOCKS)].self_attn
            cosines, _ = module.inputs[1]["position_embeddings"]
            self.small.append(cosines.mean())
            return
        self.values.append((self.shape.seq, self._get(*self._module())))

    def _write(self) -> None:
        choose = self.random
        module, io = self._module()
        value = self._fitting()
        if not self._legal(value, module, io):
            return
        if choose.random() < 0.35:
            if module.path.endswith("self_attn"):
                module.output = (value, None)
            else:
                setattr(module, io, value)
            return
        site = self._get(module, io)
        position, other = choose.randrange(self.shape.seq), choose.randrange(self.shape.seq)
        kind = choose.randrange(7)
        if kind == 0:
            site[:] = value
        elif kind == 1:
            site[:, position] = value[:, other]
        elif kind == 2:
            site[..., 4:12] += value[..., 8:16]
        elif kind == 3:
            site.view(*site.shape[:2], 4, 8)[:, :, choose.randrange(4)] = 0
        elif kind == 4:
            site.transpose(1, 2)[:, choose.randrange(HIDDEN)] *= 0.5
        elif kind == 5:
            site.mul_(0.75).add_(value, alpha=0.25)
        else:
            site[0] = value[-1].flip(0)
        if choose.random() < 0.3:
            self.values.append((self.shape.seq, site))

    def _legal(self, value: Any, module: Any, io: str) -> bool:
        """Whether a value may be written here now: a refused edit would spoil the trace."""
        sites = self.tracer.sites
        invoke = len(sites.invokes) - 1
        info = self.model.outline.modules[module.path]
        event = info.input_event if io == "input" else info.output_event
        behind = sites.recorder.value_info[sites.recorder.value(value)]
        read = max((at for at, _, _ in sites._reads.get(invoke, ())), default=NEVER)
        return max(behind.get(invoke, NEVER), read) <= (0, event)

    def _fitting(self) -> Tensor:
        """A value of the shape of this invoke's hidden states."""
        choose = self.random
        spec = (self.shape.batch, self.shape.seq, HIDDEN)
        fitting = [v for seq, v in self.values if seq == self.shape.seq and v.shape[0] == spec[0]]
        if not fitting or choose.random() < 0.15:
            return torch.randn(spec, generator=self.generator)
        value: Tensor = choose.choice(fitting[-6:])
        kind = choose.randrange(5)
        if kind == 0:
            return value
        if kind == 1:
            return torch.tanh(value) * 0.5
        if kind == 2:
            return value + torch.randn(HIDDEN, generator=self.generator)
        if kind == 3:
            return value.flip(1)
        return value - choose.choice(fitting)

    def _skip(self) -> None:
        module = self.model.model.layers[self.random.randrange(BLOCKS)]
        if self.random.random() < 0.5:
            module = module.mlp
        value = self._fitting()
        if self._legal(value, module, "input"):
            module.skip(value)

    # Values --------------------------------------------------------------------------------------

    def _op(self) -> None:
        choose = self.random
        seq, value = choose.choice(self.values[-8:])
        kind = choose.randrange(10)
        if kind == 0:
            self.values.append((seq, torch.tanh(value)))
        elif kind == 1:
            self.values.append((seq, torch.softmax(value, -1) * 3))
        elif kind == 2:
            weight = torch.randn(HIDDEN, HIDDEN, generator=self.generator) / 6
            self.values.append((seq, value @ weight))
        elif kind == 3:
            scores = value @ value.transpose(1, 2)
            self.values.append((seq, (scores / 32).softmax(-1) @ value))
        elif kind == 4:
            self.values.append((seq, value - value.mean(1, keepdim=True)))
        elif kind == 5:
            copy = value.clone()
            copy[:, 0] = copy[:, -1] * 0.5
            copy[..., ::2].neg_()
            self.values.append((seq, copy))
        elif kind == 6:
            self.small.append(value.norm(dim=-1).amax())
        elif kind == 7:
            self.small.append(value.mT[:, :4].contiguous().sum(-1))
        elif kind == 8:
            self.values.append((seq, torch.where(value > 0, value, torch.tensor(0.1))))
        else:
            noise = torch.rand_like(value)
            self.values.append((seq, value + noise))

    def _call(self) -> None:
        choose = self.random
        seq, value = choose.choice(self.values[-8:])
        kind = choose.randrange(4)
        if kind == 0:
            self.values.append((seq, self.model.model.norm(value)))
        elif kind == 1:
            logits = self.model.lm_head(self.model.model.norm(value[:, -1:]))
            self.small.append(logits.amax(-1))
        elif kind == 2:
            self.values.append((seq, self.model.model.layers[choose.randrange(BLOCKS)].mlp(value)))
        else:
            top = self.model.lm_head(value).argmax(-1)
            self.values.append((seq, self.model.model.embed_tokens(top)))

    def _param(self) -> None:
        choose = self.random
        seq, value = choose.choice(self.values[-8:])
        kind = choose.randrange(4)
        if kind == 0:
            row = self.model.lm_head.weight[choose.randrange(VOCABULARY)]
            self.values.append((seq, value + row))
        elif kind == 1:
            self.small.append((value[:, -1] @ self.model.lm_head.weight.T).logsumexp(-1))
        elif kind == 2:
            weight = self.model.model.layers[choose.randrange(BLOCKS)].input_layernorm.weight
            self.values.append((seq, value * weight))
        else:
            weight = self.model.model.layers[choose.randrange(BLOCKS)].self_attn.q_proj.weight
            self.values.append((seq, torch.tanh(value @ weight.T)))

    def _keep(self) -> None:
        choose = self.random
        if self.small and choose.random() < 0.4:
            self._save(choose.choice(self.small))
            return
        _, value = choose.choice(self.values[-8:])
        self._save(choose.choice([value, value[:, -1], value.mean(1), value.transpose(0, 1)]))

    def _save(self, value: Any) -> None:
        self.saved.append(value.save())
