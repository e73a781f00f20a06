"""What several batches in flight are worth: tokens a step and a second of vLLM, of as many sequences at most.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.in_flight --rounds 3

Answers are of very unequal length: a random model ends each with the same small probability a token. The ways take
turns; `--judge-ms` is what the reward of each answer takes, asleep, as a judge elsewhere does.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actor.in_flight import BatchesInFlight
from actor.judge import Judge
from actor.rollout import Rollouts
from actor.settings import ActorSettings, VllmSettings
from actor.tasks import Prompt, RunningSums
from actor.tokenizer import load_tokenizer
from actor.vllm.engine import VllmEngine
from actor.vllm.fetching import WeightSource
from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.types import Group
from tests.factories import UNTRUNCATED
from tests.vllm.conftest import Served, make_policies, replay_service

SEQUENCES, GROUP_SIZE, NEW_TOKENS = 64, 4, 110
WAYS = (1, 4, 16)
"""Batches in flight, of SEQUENCES sequences together."""


class Judged(RunningSums):
    """The running sums, with a judge that takes its time."""

    judge_s = 0.0

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        """See Task."""
        time.sleep(self.judge_s)
        return super().reward(prompt, response_ids)


class CountingEngine(VllmEngine):
    """Counts its decode steps."""

    num_steps = 0

    def _step(self) -> bool:
        self.num_steps += 1
        return super()._step()


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a way of drawing took."""

    lengths: list[int]
    num_steps: int
    cpu_s: float
    wall_s: float

    @property
    def rates(self) -> tuple[float, float, float]:
        """Tokens a decode step, a second of CPU and a second."""
        tokens = sum(self.lengths)
        return tokens / self.num_steps, tokens / self.cpu_s, tokens / self.wall_s


def draw(engine: CountingEngine, task: Judged, num_batches: int, num_answers: int) -> Drawn:
    """Draw at least so many answers with so many batches in flight."""
    settings = ActorSettings(
        group_size=GROUP_SIZE, groups_per_batch=SEQUENCES // GROUP_SIZE // num_batches, max_new_tokens=NEW_TOKENS
    )
    judge = Judge(task, run_id="benchmark", max_unscored_groups=1)
    rollouts = Rollouts(engine=engine, judge=judge, settings=settings, rng=np.random.default_rng(0))
    if num_batches == 1:
        return _draw(engine, rollouts.next_batch, num_answers)
    with BatchesInFlight(
        rollouts.next_batch, num_batches=num_batches, deliver=lambda groups: None, stop=threading.Event()
    ) as batches:
        return _draw(engine, batches.next_batch, num_answers)


def _draw(engine: CountingEngine, next_batch: Callable[[], list[Group]], num_answers: int) -> Drawn:
    steps, cpu_s, wall_s, lengths = engine.num_steps, time.process_time(), time.monotonic(), list[int]()
    while len(lengths) < num_answers:
        lengths += [len(trajectory.response_ids) for group in next_batch() for trajectory in group.trajectories]
    return Drawn(lengths, engine.num_steps - steps, time.process_time() - cpu_s, time.monotonic() - wall_s)


def measure(engine: CountingEngine, task: Judged, *, rounds: int, num_answers: int) -> None:
    """Print the rates of each way, and their ratios to one batch in the same round."""
    found: list[dict[int, Drawn]] = []
    for _ in range(rounds):
        found.append({way: draw(engine, task, way, num_answers) for way in WAYS})
    lengths = [length for by_way in found for drawn in by_way.values() for length in drawn.lengths]
    deciles = statistics.quantiles(lengths, n=10)
    print(f"answers: mean {statistics.fmean(lengths):.0f}, p10 {deciles[0]:.0f}, p90 {deciles[8]:.0f}, of {NEW_TOKENS}")
    for way in WAYS:
        for unit, index in (("a step", 0), ("a CPU second", 1), ("a second", 2)):
            rates = [by_way[way].rates[index] for by_way in found]
            ratios = [rate / by_way[1].rates[index] for rate, by_way in zip(rates, found, strict=True)]
            told = ", ".join(f"{rate:.3g} ({ratio:.2f} x)" for rate, ratio in zip(rates, ratios, strict=True))
            print(f"{way} x {SEQUENCES // way} sequences, tokens {unit}: {told}", flush=True)


def main() -> None:
    """Start everything, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=384)
    parser.add_argument("--judge-ms", type=float, nargs="+", default=[0.0, 5.0])
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        policies = make_policies((directory / "policy0", directory / "policy1"), tied=True)
        model_dir = policies.directories[0]
        url = stack.enter_context(replay_service(directory, model_dir, {}))
        client = ServiceClient(url, settings=ClientSettings())
        stack.callback(client.close)
        settings = VllmSettings(dtype="float32")
        engine = CountingEngine(model_dir, settings, sampling=UNTRUNCATED, seed=7, source=WeightSource(url))
        served = Served(engine, HttpWeightStore(client), policies, directory)
        served.load(0)
        task = Judged(load_tokenizer(model_dir), num_digits=4)
        draw(engine, task, 1, 1)  # the first batch of every shape costs seconds
        for judge_ms in options.judge_ms:
            task.judge_s = judge_ms / 1e3
            print(f"a reward takes {judge_ms:g} ms")
            measure(engine, task, rounds=options.rounds, num_answers=options.answers)


if __name__ == "__main__":
    main()
