"""A connection to a swarm: finds models, and runs experiments over the peers that serve them."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshive.client.errors import NoRoute, PeerError, PeerFailed
from glasshive.client.experiment import Experiment, Provenance, TraceOptions
from glasshive.client.files import fetch_model_files, read_config, read_tokenizer
from glasshive.client.job import Job
from glasshive.client.model import Model
from glasshive.client.progress import JobDisplay
from glasshive.client.route import Route, choose_route
from glasshive.client.saved import fill
from glasshive.dht.directory import ask_directory
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import GraphError
from glasshive.graph.kernels import to_torch_dtype
from glasshive.graph.plan import HIDDEN, Plan
from glasshive.graph.split import needed_blocks, split
from glasshive.graph.twin import build_twin, scan

_DIRECTORY_SECONDS = 20.0
_FILES_SECONDS = 120.0


class Swarm:
    """A swarm as a researcher uses it. A context manager; `close` ends it.

    `transport` lives on `loop`; `bootstraps` are peers whose directory is asked.
    """

    def __init__(
        self,
        loop: LoopThread,
        transport: Transport,
        bootstraps: Sequence[PeerAddress],
        cache: Path,
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._bootstraps = tuple(bootstraps)
        self._cache = cache

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; may be called again."""
        self._loop.run(self._transport.close(), 15.0)
        self._loop.close()

    def records(self, model: str | None = None) -> list[PeerRecord]:
        """Who serves a model (a name, or a manifest's hash; None: every model), checked.

        Raises what `ask_directory` raises: UnknownModel, AmbiguousModel, DirectoryUnavailable.
        """
        asking = ask_directory(self._transport, self._bootstraps, model, _DIRECTORY_SECONDS)
        return self._loop.run(asking, _DIRECTORY_SECONDS + 5)

    def model(self, name: str, *, dtype: str | None = None, attention: str | None = None) -> Model:
        """The model called `name`, or with this manifest hash.

        `dtype` and `attention` choose among the number formats and attention backends that it is
        served in; they are needed only if several are, and a trace never mixes them. Configuration
        and tokenizer come from a peer the first time. Raises NoRoute, BadModelFiles, and what
        `records` raises.
        """
        mine = self.records(name)
        for what, wanted in (("dtype", dtype), ("attention", attention)):
            served = sorted({str(getattr(one, what)) for one in mine})
            if wanted is None and len(served) > 1:
                raise NoRoute(
                    f"{name} is served with {what} {' and '.join(served)}; choose with {what}="
                )
            chosen = served[0] if wanted is None else wanted
            if chosen not in served:
                raise NoRoute(
                    f"{name} is not served with {what} {chosen}; it is with {' and '.join(served)}"
                )
            mine = [one for one in mine if getattr(one, what) == chosen]
        model_id = mine[0].model
        peers = [PeerAddress(one.peer_id, one.addresses) for one in mine]
        folder = self._loop.run(
            fetch_model_files(self._transport, peers, model_id, self._cache, _FILES_SECONDS),
            _FILES_SECONDS + 5,
        )
        config = read_config(folder)
        twin = build_twin(config, to_torch_dtype(DType.from_name(mine[0].dtype)), mine[0].attention)
        return Model(
            name=mine[0].model_name,
            model_id=model_id,
            config=config,
            tokenizer=read_tokenizer(folder),
            twin=twin,
            outline=scan(twin, config),
            runner=ModelRunner(
                self, model_id, mine[0].dtype, mine[0].attention, twin_blocks(config)
            ),
        )

    def run_job(self, job: Job) -> None:
        """Run a job to its end, from the caller's thread. An interrupt cancels it on every peer."""
        self._loop.run(job.run(), job.deadline_seconds + 10)

    @property
    def transport(self) -> Transport:
        """The connection itself."""
        return self._transport


def twin_blocks(config: Any) -> int:
    """The number of blocks of a model of this configuration."""
    return int(config.get_text_config().num_hidden_layers)


class ModelRunner:
    """Runs one model's experiments: route, split, job; again elsewhere if a peer is lost."""

    def __init__(
        self, swarm: Swarm, model_id: str, dtype: str, attention: str, n_blocks: int
    ) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._dtype = dtype
        self._attention = attention
        self._n_blocks = n_blocks
        self._known: list[PeerRecord] = []
        self._lock = threading.Lock()

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it, fill what was saved, and say where it came from.

        A trace is a pure function of its request, so after a lost peer all of it is run again on a
        route without that peer, `retries` times at most.
        """
        avoid = set(options.avoid)
        for attempt in range(options.retries + 1):
            try:
                return self._run_once(experiment, options, avoid, attempt)
            except PeerFailed as error:
                line = experiment.line_of(error.node)
                error.args = (f"{f'{line}: ' if line else ''}{_told(error)}",)
                raise
            except PeerError as error:
                avoid.add(error.peer)
                if attempt == options.retries:
                    raise
                try:
                    self._route(experiment, avoid, fresh=True)
                except NoRoute as none:
                    raise error from none
        raise NoRoute(f"retries={options.retries} leaves no attempt; give 0 or more")

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take on the route that it would get now."""
        route = self._route(experiment, set(options.avoid), fresh=False)
        plan = self._plan(experiment, route)
        return {
            "route": [f"{one.start}:{one.end} {one.peer_id}" for one in route.records],
            "hops": len(plan.parts),
            "passes": len(plan.passes.passes),
            "rows": sum(one.batch for one in plan.passes.passes),
            "hop_bytes": sum(self._edge_bytes(experiment, plan)),
            "saved_bytes": experiment.bill.saved_bytes,
            "peak_bytes": experiment.bill.peak_bytes,
            "flops": experiment.bill.flops,
            "sent_bytes": sum(tensor.nbytes for tensor in experiment.consts.values()),
        }

    def describe(self) -> str:
        """Who serves which blocks, a line each."""
        records = sorted(self._records(fresh=False), key=lambda one: (one.start, one.end))
        lines = [
            f"  blocks {one.start}:{one.end} of {one.n_blocks}  {one.dtype}  {one.attention}  "
            f"{one.peer_id}"
            for one in records
        ]
        return "served by\n" + "\n".join(lines or ["  nobody"])

    def _edge_bytes(self, experiment: Experiment, plan: Plan) -> list[int]:
        sizes = []
        for edge in plan.edges():
            if edge.value == HIDDEN:
                one = plan.passes.passes[edge.pass_index]
                sizes.append(experiment.outline.hidden_spec(one.batch, one.seq).nbytes)
            else:
                sizes.append(experiment.specs[edge.value].nbytes)
        return sizes

    def _run_once(
        self, experiment: Experiment, options: TraceOptions, avoid: set[Any], attempt: int
    ) -> Provenance:
        route = self._route(experiment, avoid, fresh=attempt > 0)
        plan = self._plan(experiment, route)
        with JobDisplay(options.show_progress, route) as display:
            job = Job(
                transport=self._swarm.transport,
                plan=plan,
                peers=route.peers,
                model_id=self._model_id,
                dtype=self._dtype,
                inputs=experiment.inputs,
                consts=experiment.consts,
                expected=experiment.saved_specs(),
                trace_id=secrets.token_bytes(16),
                deadline_seconds=options.deadline_seconds,
                on_change=display.update,
            )
            self._swarm.run_job(job)
        for name, tensor in experiment.saves.items():
            fill(tensor, job.saves[name])
        return Provenance(
            model_id=self._model_id,
            dtype=self._dtype,
            attention=route.records[0].attention,
            graph_digest=experiment.digest,
            hops=tuple(
                (
                    hop.peer.peer_id,
                    str(hop.part.span),
                    hop.compute_seconds,
                    hop.hidden_bytes,
                    hop.carried_bytes,
                    hop.saved_bytes,
                )
                for hop in job.hops
            ),
            seconds=job.clock() - job.began_at,
            sent_bytes=job.sent_bytes,
            received_bytes=job.received_bytes,
            passes=len(plan.passes.passes),
            retried=attempt,
        )

    def _plan(self, experiment: Experiment, route: Route) -> Plan:
        outline, graph = experiment.outline, experiment.graph
        try:
            return split(graph, outline, experiment.passes, route.spans, experiment.specs)
        except GraphError as error:
            if (line := experiment.line_of(error.node)) is not None:
                error.args = (f"{line}: {error}",)
            raise

    def _route(self, experiment: Experiment, avoid: set[Any], *, fresh: bool) -> Route:
        needed = needed_blocks(experiment.graph, experiment.outline)
        if not fresh:
            with contextlib.suppress(NoRoute):  # what is known may be old
                known = self._records(fresh=False)
                return choose_route(known, needed, self._n_blocks, avoid=frozenset(avoid))
        known = self._records(fresh=True)
        return choose_route(known, needed, self._n_blocks, avoid=frozenset(avoid))

    def _records(self, *, fresh: bool) -> list[PeerRecord]:
        """The peers of this model and dtype: as known, or asked again if any has expired."""
        with self._lock:
            now = self._swarm.transport.now()
            if fresh or not self._known or any(one.expires_at_seconds < now for one in self._known):
                records = self._swarm.records(self._model_id)
                kind = (self._dtype, self._attention)
                self._known = [one for one in records if (one.dtype, one.attention) == kind]
            return list(self._known)


def _told(error: PeerFailed) -> str:
    return f"{error.code} at peer {error.peer} (blocks {error.span}): {error}"
