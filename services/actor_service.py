"""`stalewise act`: one actor process, from its settings to a clean end."""

import hashlib
import itertools
import logging
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actor.engine import Engine
from actor.evaluate import Evaluator
from actor.follow import FollowLoop
from actor.judge import Judge
from actor.loop import ActorLoop
from actor.receiver import FollowingReceiver, Receiver
from actor.rollout import Rollouts
from actor.settings import ActorSettings
from actor.spool import Spool, SpoolInUse
from actor.status import Pulse, Status
from actor.tasks import Task, make_task
from actor.tokenizer import load_tokenizer
from actor.weight_sync import WeightSync
from buffer.client import HttpTable, HttpWeightStore, ServiceClient
from buffer.errors import EngineUnreachable, InvalidSettings
from buffer.evaluations_client import HttpEvaluations
from buffer.fingerprint import model_fingerprint
from buffer.weights.follower import Follower
from services.model_dir import local_model_dir
from services.run_check import check_run
from services.settings import RunConfig, connect

if TYPE_CHECKING:
    from actor.vllm.remote import RemoteVllmEngine

log = logging.getLogger(__name__)

ABORT_AGAIN_S = 0.05
"""Seconds from one abort to the next: what a generation that began after a stop may last."""
THREAD_END_S = 1.0
"""A thread in a long poll is not waited for: it is a daemon and holds nothing that a kill could break."""


def run_actor(
    config: RunConfig, *, actor_id: str | None = None, engine: str | None = None, follow_only: bool = False
) -> None:
    """Generate until SIGTERM or SIGINT. `engine` overrides actor.engine; without `actor_id` a free one is taken.

    With `follow_only` nothing is generated: a vLLM server is kept at the newest version for agents that draw from it.

    Raises InvalidSettings, SpoolInUse, RunMismatch, ServiceUnreachable, and what ends the loop.
    """
    make_engine = _engine_maker(engine or config.actor.engine, config.actor)
    if follow_only:
        _check_follows(engine or config.actor.engine, config.actor)
    model_dir = local_model_dir(config.run.model)
    fingerprint = model_fingerprint(model_dir)
    task = None if follow_only else make_task(config.actor.task, load_tokenizer(model_dir))
    with closing(connect(config)) as client:
        check_run(client, config, fingerprint)
    name, directory, spool = _claim(config, actor_id)
    with closing(spool), closing(_client(config)) as client:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        log.info("actor %s of run %s, %d groups in the spool", name, config.run.name, spool.num_groups)
        seeds = _seeds(config.run.seed, name, _count_start(directory))
        feed = _Feed(client, config.service.token.get_secret_value() if config.service.token else None, directory)
        process = _Process(config, name, fingerprint, spool, client, stop)
        if task is None:
            process.follow(_vllm_server(config.actor, model_dir, feed), seeds)
        else:
            made = make_engine(config.actor, model_dir, int(seeds.generate_state(1)[0]), feed)
            process.generate(*made, task, seeds)


@dataclass(frozen=True, slots=True)
class _Process:
    """The threads of one actor."""

    config: RunConfig
    actor_id: str
    fingerprint: str
    spool: Spool
    client: ServiceClient
    stop: threading.Event

    def generate(self, engine: Engine, receiver: Receiver, task: Task, seeds: np.random.SeedSequence) -> None:
        """Generate, deliver and evaluate until `stop` is set or a thread fails."""
        prompt_seed, sync_seed, loop_seed = seeds.spawn(3)
        rng, settings = np.random.default_rng(prompt_seed), self.config.actor
        judge = Judge(task, run_id=self.config.run.name, max_unscored_groups=settings.task.max_unscored_groups)

        def make_loop(sync: WeightSync, status: Status) -> ActorLoop:
            return ActorLoop(
                evaluator=self._evaluator(engine, judge),
                rollouts=Rollouts(engine=engine, judge=judge, settings=settings, rng=rng),
                inbox=HttpTable(self.client),
                spool=self.spool,
                sync=sync,
                status=status,
                settings=settings,
                stop=self.stop,
                now=time.monotonic,
                jitter=_jitter(loop_seed),
            )

        self._run(engine, receiver, _jitter(sync_seed), make_loop, unscored_groups_total=lambda: judge.unscored_total)

    def follow(self, server: "RemoteVllmEngine", seeds: np.random.SeedSequence) -> None:
        """Keep a server at the newest version until `stop` is set or a thread fails."""

        def make_loop(sync: WeightSync, status: Status) -> FollowLoop:
            return FollowLoop(server=server, sync=sync, status=status, stop=self.stop)

        self._run(server, server, _jitter(seeds), make_loop, unscored_groups_total=lambda: 0)

    def _run(
        self,
        engine: Engine,
        receiver: Receiver,
        jitter: random.Random,
        make_loop: Callable[[WeightSync, Status], ActorLoop | FollowLoop],
        *,
        unscored_groups_total: Callable[[], int],
    ) -> None:
        """Run a loop beside the weight sync and the heartbeats."""
        settings, status = self.config.actor, Status(time.monotonic)
        sync = WeightSync(
            store=HttpWeightStore(self.client),
            engine=engine,
            run_id=self.config.run.name,
            model_fingerprint=self.fingerprint,
            receiver=receiver,
            settings=settings,
            stop=self.stop,
            jitter=jitter,
        )
        pulse = Pulse(
            status=status,
            version=lambda: engine.version,
            loads=lambda: tuple(sync.loads),
            unscored_groups_total=unscored_groups_total,
            monitor=self.client,
            actor_id=self.actor_id,
            heartbeat_s=settings.heartbeat_s,
            stall_s=settings.stall_s,
            stop=self.stop,
        )
        loop = make_loop(sync, status)
        sync.start()
        pulse.start()
        ended = threading.Event()
        threading.Thread(target=abort_when_told, args=(engine, self.stop, ended), name="abort", daemon=True).start()
        try:
            loop.run()
        finally:
            ended.set()
            self.stop.set()
            sync.join(THREAD_END_S)
            pulse.join(THREAD_END_S)
            log.info("actor %s ended: %s", self.actor_id, dict(status.outcomes))

    def _evaluator(self, engine: Engine, judge: Judge) -> Evaluator:
        return Evaluator(
            engine=engine,
            judge=judge,
            evaluations=HttpEvaluations(self.client),
            settings=self.config.actor,
            actor_id=self.actor_id,
            solved_reward=self.config.table.solved_reward,
            stop=self.stop,
        )


def abort_when_told(engine: Engine, stop: threading.Event, ended: threading.Event) -> None:
    """End long generations once `stop` is set, also one that begins just then; their groups are dropped."""
    stop.wait()
    while not ended.wait(ABORT_AGAIN_S):
        try:
            engine.abort()
        except EngineUnreachable as error:  # then nothing is left to wait for
            log.warning("nothing to abort: %s", error)
            return


@dataclass(frozen=True, slots=True)
class _Feed:
    """Where an engine's weights come from."""

    client: ServiceClient
    token: str | None
    directory: Path


def _torch_engine(settings: ActorSettings, model_dir: Path, seed: int, feed: _Feed) -> tuple[Engine, Receiver]:
    from actor.torch_engine import TorchEngine

    engine = TorchEngine(model_dir, seed=seed, ship_distributions=settings.ship_distributions)
    return engine, FollowingReceiver(Follower(HttpWeightStore(feed.client), feed.directory), engine)


def _vllm_engine(settings: ActorSettings, model_dir: Path, seed: int, feed: _Feed) -> tuple[Engine, Receiver]:
    from actor.vllm.fetching import WeightSource
    from actor.vllm.sampling import check_sampling

    if settings.evaluation.every_updates is not None:  # the engine checks actor.sampling
        check_sampling(settings.evaluation.sampling, setting="actor.evaluation.sampling")
    if settings.vllm.url is not None:
        remote = _vllm_server(settings, model_dir, feed)
        return remote, remote
    from actor.vllm.engine import VllmEngine

    source = WeightSource(feed.client.url, feed.token, feed.client.settings.ca_file)
    engine = VllmEngine(model_dir, settings.vllm, sampling=settings.sampling, seed=seed, source=source)
    return engine, engine


def _vllm_server(settings: ActorSettings, model_dir: Path, feed: _Feed) -> "RemoteVllmEngine":
    from actor.vllm.fetching import WeightSource
    from actor.vllm.remote import RemoteVllmEngine

    source = WeightSource(feed.client.url, feed.token, feed.client.settings.ca_file)
    return RemoteVllmEngine(model_dir, settings.vllm, sampling=settings.sampling, source=source)


_Maker = Callable[[ActorSettings, Path, int, _Feed], tuple[Engine, Receiver]]

_ENGINES: dict[str, _Maker] = {"torch": _torch_engine, "vllm": _vllm_engine}
"""Each imports its framework only when it is chosen."""


def _engine_maker(name: str, settings: ActorSettings) -> _Maker:
    if name not in _ENGINES:
        raise InvalidSettings(f"engine {name!r} is unknown", hint=f"choose one of {', '.join(_ENGINES)}")
    if settings.ship_distributions and name != "torch":
        raise InvalidSettings(
            f"actor.ship_distributions is set, but engine {name} reports the log-probs of a few ids alone",
            hint="use actor.engine = torch, or leave the setting out: trust regions then use sampled stand-ins",
        )
    if settings.batches_in_flight > 1 and name == "torch":
        raise InvalidSettings(
            f"actor.batches_in_flight={settings.batches_in_flight}, but engine torch draws one batch at a time",
            hint="use actor.engine = vllm, or leave the setting out and start more actors",
        )
    return _ENGINES[name]


def _check_follows(name: str, settings: ActorSettings) -> None:
    """Raise InvalidSettings for an engine that agents of one's own could not draw from."""
    if name != "vllm" or settings.vllm.url is None:
        raise InvalidSettings(
            "--follow-only keeps a vLLM server at the newest version, and none is named",
            hint="set actor.engine = vllm and actor.vllm.url to a server that `stalewise serve-vllm` started",
        )
    if settings.vllm.lora_rank:
        raise InvalidSettings(
            f"--follow-only does not go with actor.vllm.lora_rank={settings.vllm.lora_rank}: an adapter that a newer"
            " one replaced would be taken from under the agents' requests",
            hint="train whole weights, or let `stalewise act` generate",
        )


def _client(config: RunConfig) -> ServiceClient:
    """Return a client that never retries: the loops of an actor have their own patience."""
    return connect(config.model_copy(update={"client": config.client.model_copy(update={"retry_budget_s": 0.0})}))


def _claim(config: RunConfig, actor_id: str | None) -> tuple[str, Path, Spool]:
    """Take the directory and the spool of an actor id; without one, of the first free <host>-<number>."""
    if actor_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", actor_id):
        raise InvalidSettings(f"actor id {actor_id!r} is not a plain name", hint="use letters, digits, '.', '_', '-'")
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:48].lstrip(".-") or "actor"
    for number in itertools.count():
        chosen = actor_id or f"{host}-{number}"
        directory = config.run.directory / "actors" / chosen
        try:
            return chosen, directory, Spool(directory / "spool", max_bytes=config.actor.spool_bytes)
        except SpoolInUse:
            if actor_id is not None:
                raise
    raise AssertionError("itertools.count ended")


def _count_start(directory: Path) -> int:
    """Return how often this actor was started before: a restart must not draw the same responses again."""
    path = directory / "starts"
    starts = int(path.read_text()) if path.is_file() else 0
    partial = path.with_suffix(".partial")
    partial.write_text(str(starts + 1))
    partial.replace(path)
    return starts


def _jitter(seed: np.random.SeedSequence) -> random.Random:
    return random.Random(int(seed.generate_state(1)[0]))


def _seeds(run_seed: int, actor_id: str, starts: int) -> np.random.SeedSequence:
    """Return seeds of this actor's own, the same for the same run seed, id and number of starts."""
    name = int.from_bytes(hashlib.sha256(actor_id.encode()).digest()[:8], "big")
    return np.random.SeedSequence([abs(run_seed), name, starts])
