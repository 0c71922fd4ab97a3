"""How much of a host a client gets: the host's own limits, and what the swarm's policy leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from glasshive.graph.budget import Budget
from glasshive.graph.codec import GraphLimits, encode_graph
from glasshive.graph.errors import OverBudget
from glasshive.graph.plan import Part
from glasshive.security.policy import Policy
from glasshive.security.whitelist import Limits, limits_by_name


@dataclass(frozen=True, slots=True)
class HostLimits:
    """One number for each thing that a client can ask for."""

    graph: GraphLimits = field(default_factory=GraphLimits)
    traces: int = 16
    traces_per_client: int = 8
    traces_per_origin: int = 12
    """Of all keys that come from one address: a class has most places, and leaves others some.

    Not in private swarms: there a key costs an invite, and an institution may have one address."""
    generations_per_client: int = 8
    trace_seconds: float = 600.0
    prepare_seconds: float = 60.0
    batch_rows: int = 256
    context_tokens: int = 8192
    memory_bytes: int | None = None
    """The most that all traces and the constants kept take at a time, as far as it is free at the
    start; None: what is free then, less a reserve (peer/memory_book.py)."""
    const_cache_bytes: int = 1 << 30
    budget: Budget = field(
        default_factory=lambda: Budget(
            peak_bytes=4 << 30, flops=10**13, saved_bytes=2 << 30, seconds=300.0
        )
    )

    # An op takes at most 10 times what it is billed on a CPU (bench/pace.py), a whole stage less.
    # On a GPU the first call of some compiles a kernel for up to 5 s: one node takes far less than
    # 15 s for that, and a stage may have several such nodes.
    stage_least_seconds: float = 30.0
    stage_factor: float = 3.0
    node_least_seconds: float = 15.0
    node_factor: float = 10.0

    def stage_seconds(self, estimated_seconds: float) -> float:
        """How long a stage may take of a part that was thought to take so long.

        It is ended then at its next node, so the estimate is given the benefit of the doubt.
        """
        return self.stage_least_seconds + self.stage_factor * estimated_seconds

    def runaway_seconds(self, estimated_seconds: float) -> float:
        """After how long a node or block that still runs is a runaway: the process is ended.

        All of a part may be in one node of it. No node has longer than a whole trace has.
        """
        seconds = self.node_least_seconds + self.node_factor * estimated_seconds
        return min(seconds, self.trace_seconds)

    def within(self, memory_bytes: int) -> HostLimits:
        """The same on a host that has so much for all, and so at most that for one.

        The constants kept have their own part of it: a trace never waits for their lease to end.
        """
        const_cache_bytes = min(self.const_cache_bytes, memory_bytes // 8)
        most_bytes = memory_bytes - const_cache_bytes
        peak_bytes = min(self.budget.peak_bytes, most_bytes)
        return replace(
            self,
            memory_bytes=memory_bytes,
            const_cache_bytes=const_cache_bytes,
            budget=replace(
                self.budget,
                peak_bytes=peak_bytes,
                saved_bytes=min(self.budget.saved_bytes, peak_bytes),
            ),
        )

    def numbers(self) -> Limits:
        """The same in a whitelist's terms, rounded up to whole numbers."""
        budget = self.budget
        return Limits(
            graph_bytes=self.graph.graph_bytes,
            nodes=self.graph.nodes,
            const_bytes=budget.peak_bytes,  # they are part of it
            peak_bytes=budget.peak_bytes,
            flops=budget.flops,
            seconds=math.ceil(min(budget.seconds, self.trace_seconds)),
            saved_bytes=budget.saved_bytes,
            steps=self.graph.steps,
            batch_rows=self.batch_rows,
            context_tokens=self.context_tokens,
            traces_per_client=min(self.traces_per_client, self.traces),
            generations_per_client=min(self.generations_per_client, self.traces),
        )

    def under(self, policy: Policy) -> HostLimits:
        """The smaller of these limits and the policy's, number by number."""
        own = limits_by_name(self.numbers())
        told = policy.limits
        smaller = {name for name, value in limits_by_name(told).items() if value < own[name]}
        by = MappingProxyType({name: f" by limits.{name} of {policy.who}" for name in smaller})
        return replace(
            self,
            graph=replace(
                self.graph,
                graph_bytes=min(self.graph.graph_bytes, told.graph_bytes),
                nodes=min(self.graph.nodes, told.nodes),
                steps=min(self.graph.steps, told.steps),
            ),
            traces_per_client=min(self.traces_per_client, told.traces_per_client),
            generations_per_client=min(self.generations_per_client, told.generations_per_client),
            batch_rows=min(self.batch_rows, told.batch_rows),
            context_tokens=min(self.context_tokens, told.context_tokens),
            budget=replace(
                self.budget,
                peak_bytes=min(self.budget.peak_bytes, told.peak_bytes),
                flops=min(self.budget.flops, told.flops),
                saved_bytes=min(self.budget.saved_bytes, told.saved_bytes),
                seconds=min(self.budget.seconds, float(told.seconds)),
                allowed_by=by,
            ),
        )

    def by(self, name: str) -> str:
        """Whose limit that one is by its name in a whitelist; empty for the host's own."""
        return self.budget.by(name)

    def check_graph_bytes(self, part: Part, most_bytes: int) -> None:
        """Raise OverBudget for a graph of more bytes than are allowed; its part has `most_bytes`.

        A graph has one encoding. Most parts are small, and theirs isn't made again.
        """
        allowed = self.graph.graph_bytes
        if most_bytes > allowed and (graph_bytes := len(encode_graph(part.graph))) > allowed:
            raise OverBudget(
                f"a graph of {graph_bytes} bytes, but {allowed} are allowed"
                f"{self.by('graph_bytes')}; split the work over several traces"
            )
