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
from buffer.errors import EngineUnreachable, InvalidSettings, RunMismatch
from buffer.evaluations_client import HttpEvaluations
from buffer.fingerprint import model_fingerprint
from buffer.weights.follower import Follower
from services.model_dir import local_model_dir

if TYPE_CHECKING:
    from services.settings import RunConfig

log = logging.getLogger(__name__)

ABORT_AGAIN_S = 0.05
"""Seconds from one abort to the next: what a generation that began after a stop may last."""
THREAD_END_S = 1.0
"""A thread in a long poll is not waited for: it is a daemon and holds nothing that a kill could break."""


def run_actor(config: "RunConfig", *, actor_id: str | None = None, engine: str | None = None) -> None:
    """Generate until SIGTERM or SIGINT. `engine` overrides actor.engine; without `actor_id` a free one is taken.

    Raises InvalidSettings, SpoolInUse, RunMismatch, ServiceUnreachable, and what ends the loop.
    """
    make_engine = _engine_maker(engine or config.actor.engine, config.actor)
    model_dir = local_model_dir(config.run.model)
    fingerprint = model_fingerprint(model_dir)
    task = make_task(config.actor.task, load_tokenizer(model_dir))
    _check_run(config, fingerprint)
    name, directory, spool = _claim(config, actor_id)
    with closing(spool), closing(_client(config, retry_budget_s=0.0)) as client:  # the loops have their own patience
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        log.info("actor %s of run %s, %d groups in the spool", name, config.run.name, spool.num_groups)
        seeds = _seeds(config.run.seed, name, _count_start(directory))
        feed = _Feed(client, config.service.token.get_secret_value() if config.service.token else None, directory)
        made = make_engine(config.actor, model_dir, int(seeds.generate_state(1)[0]), feed)
        process = _Process(config, name, fingerprint, spool, client, stop)
        process.run(*made, task, seeds)


@dataclass(frozen=True, slots=True)
class _Process:
    """The threads of one actor."""

    config: "RunConfig"
    actor_id: str
    fingerprint: str
    spool: Spool
    client: ServiceClient
    stop: threading.Event

    def run(self, engine: Engine, receiver: Receiver, task: Task, seeds: np.random.SeedSequence) -> None:
        """Run them until `stop` is set or one of them fails."""
        settings, status = self.config.actor, Status(time.monotonic)
        prompt_seed, *jitter_seeds = seeds.spawn(3)
        jitters = [random.Random(int(seed.generate_state(1)[0])) for seed in jitter_seeds]
        judge = Judge(task, run_id=self.config.run.name, max_unscored_groups=settings.task.max_unscored_groups)
        sync = WeightSync(
            store=HttpWeightStore(self.client),
            engine=engine,
            run_id=self.config.run.name,
            model_fingerprint=self.fingerprint,
            receiver=receiver,
            settings=settings,
            stop=self.stop,
            jitter=jitters[0],
        )
        pulse = Pulse(
            status=status,
            version=lambda: engine.version,
            loads=lambda: tuple(sync.loads),
            unscored_groups_total=lambda: judge.unscored_total,
            monitor=self.client,
            actor_id=self.actor_id,
            heartbeat_s=settings.heartbeat_s,
            stall_s=settings.stall_s,
            stop=self.stop,
        )
        rng = np.random.default_rng(prompt_seed)
        loop = ActorLoop(
            evaluator=self._evaluator(engine, judge),
            rollouts=Rollouts(engine=engine, judge=judge, settings=settings, rng=rng),
            inbox=HttpTable(self.client),
            spool=self.spool,
            sync=sync,
            status=status,
            settings=settings,
            stop=self.stop,
            now=time.monotonic,
            jitter=jitters[1],
        )
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
    source = WeightSource(feed.client.url, feed.token, feed.client.settings.ca_file)
    if settings.vllm.url is not None:
        from actor.vllm.remote import RemoteVllmEngine

        remote = RemoteVllmEngine(model_dir, settings.vllm, sampling=settings.sampling, source=source)
        return remote, remote
    from actor.vllm.engine import VllmEngine

    engine = VllmEngine(model_dir, settings.vllm, sampling=settings.sampling, seed=seed, source=source)
    return engine, engine


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


def _client(config: "RunConfig", *, retry_budget_s: float) -> ServiceClient:
    from services.settings import connect

    client = config.client.model_copy(update={"retry_budget_s": retry_budget_s})
    return connect(config.model_copy(update={"client": client}))


def _check_run(config: "RunConfig", fingerprint: str) -> None:
    """Wait for the service and compare whom we are talking to. Raises RunMismatch."""
    with closing(_client(config, retry_budget_s=config.client.retry_budget_s)) as client:
        info = client.run_info()
    if info.run_id != config.run.name:
        raise RunMismatch(
            f"{client.url} serves run {info.run_id}, this actor is set to run {config.run.name}",
            hint="set run.name or service.url",
        )
    if info.model_fingerprint not in (None, fingerprint):
        raise RunMismatch(
            f"run {info.run_id} trains the model {str(info.model_fingerprint)[:12]}, {config.run.model} is"
            f" {fingerprint[:12]}",
            hint="set run.model to a copy of the learner's model directory: config and tokenizer must be the same",
        )


def _claim(config: "RunConfig", actor_id: str | None) -> tuple[str, Path, Spool]:
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


def _seeds(run_seed: int, actor_id: str, starts: int) -> np.random.SeedSequence:
    """Return seeds of this actor's own, the same for the same run seed, id and number of starts."""
    name = int.from_bytes(hashlib.sha256(actor_id.encode()).digest()[:8], "big")
    return np.random.SeedSequence([abs(run_seed), name, starts])
