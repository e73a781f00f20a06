"""One run of the study: the real actor, collation, policy and step in one process, with a lag that is exact.

Update u trains on data of policy max(0, u - lag): a queue that starts with `lag` batches of the initial policy gets one
batch of the current policy before each update and gives its oldest to it. With reuse r each batch is trained on r times
in a row, and a new one is generated for every r-th update.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import JsonValue

from actor.evaluate import held_out_accuracy
from actor.judge import Judge
from actor.rollout import Rollouts
from actor.settings import ActorSettings
from actor.torch_engine import TorchEngine
from benchmarks.study.models import checkpoint
from benchmarks.study.tasks import TASKS, StudyTask, answer_tokens
from buffer.errors import StalewiseError
from buffer.staleness import age_updates
from buffer.types import Group, Sample, SampleInfo
from learner.collate import collate
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.policy import Policy
from learner.settings import LearnerSettings, ObjectiveSettings, OptimizerSettings
from learner.step import SKIPPED, Trainer

GROUP_SIZE = 8
GROUPS_PER_UPDATE = 16
ROLLOUTS_PER_BATCH = GROUP_SIZE * GROUPS_PER_UPDATE
NUM_EVALUATIONS = 12
FINAL_PASSES = 4
"""Passes over the 512 held-out prompts for the final accuracy: a standard error of one point or less."""
MICRO_BATCH_TOKENS = 32_768
GRAD_CLIP_NORM = 1.0
INITIAL_SEED = 1_000_000
"""Added to a run's seed for the data of the initial policy, or the later batches would ask the same prompts again."""
REPORTED = ("ratio/variance", "effective_samples/share", "k3/nats_mean", "gradient/norm", "multiplier/variance")
"""Metrics kept in a record, with the share of sequences that each gate keeps: means over the last third of a run."""


Point = tuple[int, int, float]
"""Updates, rollouts trained on, held-out accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that a result depends on, besides the code."""

    task: str = "running_sums"
    objective: str
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    lag: int = 0
    reuse: int = 1
    updates: int = 250
    lr: float
    schedule: Literal["constant", "linear"]
    warmup_seed: int = 0
    """Which warm-up checkpoint the run starts from."""
    grad_clip_norm: float = GRAD_CLIP_NORM
    """Largest norm of a gradient; longer ones are scaled down to it."""
    seed: int
    """Of prompts and draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a run."""

    curve: list[Point]
    """From the start to the end."""
    final: float
    """Held-out accuracy at the end, over FINAL_PASSES passes; where a run broke, of the weights that it broke with."""
    ages: tuple[int, int]
    """Smallest and largest age of the data after the first `lag` updates."""
    metrics: dict[str, float]
    failure: str | None
    """The sentence that ended the run early; None for a run that went through."""
    skipped: int
    """Updates that the learner refused to make, such as those with a gradient of 30 times the usual length."""
    seconds: float


class Simulation:
    """Actor and learner of one run, in turns."""

    def __init__(self, run: Run, models: Path, scratch: Path) -> None:
        self.run = run
        self._scratch = scratch
        torch.set_num_threads(1)
        torch.manual_seed(run.seed)
        self.task = TASKS[run.task]()
        self.actor = _actor_settings(self.task)
        model_dir = checkpoint(models, run.task, run.warmup_seed)
        self.engine = TorchEngine(model_dir, seed=run.seed)
        self.trainer = _trainer(run, model_dir)
        self._rollouts = _rollouts(self.engine, self.task, self.actor, seed=run.seed)
        self.load()
        self._queue = deque(_initial_batches(model_dir, run.task, run.lag, seed=INITIAL_SEED + run.seed))
        self._groups: list[Group] = []

    def load(self) -> None:
        """Give the actor the learner's weights."""
        path = self._scratch / "weights.safetensors"
        safetensors.torch.save_file({n: t.contiguous() for n, t in self.trainer.policy.weights().items()}, path)
        self.engine.load(path, self.trainer.progress.clock)

    def batch(self, update: int) -> list[Group]:
        """Return the groups that this update trains on."""
        if update % self.run.reuse == 0:
            if update + self.run.lag < self.run.updates:  # else nobody would train on it
                self.load()
                self._queue.append(self._rollouts.next_batch())
            self._groups = self._queue.popleft()
        return self._groups

    def train(self, groups: list[Group]) -> dict[str, float]:
        """Make an update; return its metrics. Raises as Trainer.update."""
        clock = self.trainer.progress.clock
        return self.trainer.update(collate(_samples(groups, clock), clock=clock))

    def accuracy(self, passes: int = 1) -> float:
        """Held-out accuracy of the weights at hand."""
        self.load()
        return sum(held_out_accuracy(self.engine, self.task, self.actor) for _ in range(passes)) / passes


def simulate(run: Run, models: Path, on_evaluation: Callable[[Point], object] = lambda point: None) -> Result:
    """Run to the end, or to the named error that ends it: a method that breaks is a result, too."""
    assert run.lag == 0 or run.reuse == 1, "lag and reuse are separate axes of the study"
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        simulation = Simulation(run, models, Path(scratch))
        curve: list[Point] = []

        def evaluate(updates: int, passes: int = 1) -> None:
            curve.append((updates, -(-updates // run.reuse) * ROLLOUTS_PER_BATCH, simulation.accuracy(passes)))
            on_evaluation(curve[-1])

        evaluate(0)
        ages: set[int] = set()
        history: list[dict[str, float]] = []
        failure, skipped, skipped_in_a_row = None, 0, 0
        every = max(1, run.updates // NUM_EVALUATIONS)
        for update in range(run.updates):
            groups = simulation.batch(update)
            if update >= run.lag:
                clock = simulation.trainer.progress.clock
                ages |= {clock - oldest for group in groups if (oldest := group.oldest_version) is not None}
            try:
                history.append(simulation.train(groups))
                skipped_in_a_row = 0
            except tuple(SKIPPED) as error:  # as learner.loop does: the batch is spent, the weights stay
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                if skipped_in_a_row >= _settings(run).max_skipped_updates:
                    failure = f"update {update}: {error}"
                    break
            except StalewiseError as error:
                failure = f"update {update}: {error}"
                break
            if (update + 1) % every == 0 and update + 1 < run.updates:
                evaluate(update + 1)
        evaluate(update + 1, FINAL_PASSES)
    return Result(
        curve=curve,
        final=curve[-1][2],
        ages=(min(ages, default=-1), max(ages, default=-1)),
        metrics=_means(history[len(history) * 2 // 3 :]),
        failure=failure,
        skipped=skipped,
        seconds=round(time.perf_counter() - started_s, 1),
    )


@lru_cache(maxsize=8)
def _initial_batches(model_dir: Path, task_name: str, count: int, *, seed: int) -> tuple[list[Group], ...]:
    """Return what the initial policy answers: the same for every method, so made once for all runs of a process."""
    task = TASKS[task_name]()
    engine = TorchEngine(model_dir, seed=seed)
    engine.load(model_dir / "model.safetensors", 0)
    rollouts = _rollouts(engine, task, _actor_settings(task), seed=seed)
    return tuple(rollouts.next_batch() for _ in range(count))


def _rollouts(engine: TorchEngine, task: StudyTask, settings: ActorSettings, *, seed: int) -> Rollouts:
    judge = Judge(task, run_id="study", max_unscored_groups=1)
    return Rollouts(engine=engine, judge=judge, settings=settings, rng=np.random.default_rng(seed))


def _actor_settings(task: StudyTask) -> ActorSettings:
    return ActorSettings(group_size=GROUP_SIZE, groups_per_batch=GROUPS_PER_UPDATE, max_new_tokens=answer_tokens(task))


def _settings(run: Run) -> LearnerSettings:
    return LearnerSettings(
        objective=ObjectiveSettings(name=run.objective, options=dict(run.options)),
        optimizer=OptimizerSettings(
            lr=run.lr,
            schedule=run.schedule,
            warmup_updates=min(20, run.updates),
            grad_clip_norm=run.grad_clip_norm,
        ),
        groups_per_update=GROUPS_PER_UPDATE,
        total_updates=run.updates,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
    )


def _trainer(run: Run, model_dir: Path) -> Trainer:
    settings = _settings(run)
    return Trainer(
        policy=Policy.load(model_dir, device="cpu", micro_batch_tokens=MICRO_BATCH_TOKENS, compute=settings.compute),
        objective=build_objective(run.objective, run.options),
        settings=settings,
        diagnose=diagnose,
        now=time.perf_counter,
    )


def _samples(groups: list[Group], clock: int) -> list[Sample]:
    ages = [age_updates(clock, group.oldest_version) for group in groups]
    return [
        Sample(group=group, info=SampleInfo(probability=1.0, num_candidates=1, times_sampled=1, age_updates=age))
        for group, age in zip(groups, ages, strict=True)
    ]


def _means(history: list[dict[str, float]]) -> dict[str, float]:
    names = {name for record in history for name in record}
    wanted = [n for n in names if n in REPORTED or (n.startswith("gate/") and n.endswith("_sequences_kept_share"))]
    means = {name: np.mean([record[name] for record in history if name in record]) for name in sorted(wanted)}
    return {name: round(float(mean), 5) for name, mean in means.items()}
