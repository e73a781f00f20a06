"""What it is worth that actor and learner do not wait for each other (goal R10).

Asynchronous: the demo's processes (service, Redis, one actor, learner), each rollout trained on once, as many rollouts
in a batch as an update takes. Lock-step: the same actor, collation and step in turns in one process, the weights handed
over by a file: it is spared the service. Side by side: this actor and this learner at once, in two processes that have
nothing to do with each other: what the machine itself grants. With equal costs and two real cores that would be 2.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.asynchrony [--updates 150]
"""

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from benchmarks.study.simulation import GROUP_SIZE, GROUPS_PER_UPDATE, Run, Simulation
from tests.e2e.demo_process import demo_process

RUN = Run(objective="stalewise", lr=4e-4, schedule="linear", seed=0)
DEMO_MODEL = Path(__file__).parents[1] / "models/running-sums"
WARM_UP = 20
"""Updates of each side that are not counted."""


def lock_step(updates: int, models: Path, scratch: Path) -> tuple[float, float]:
    """Return the median seconds that a batch of rollouts and an update take."""
    simulation = Simulation(RUN, models, scratch)
    turns = []
    for update in range(updates):
        began_s = time.perf_counter()
        groups = simulation.batch(update)
        drawn_s = time.perf_counter()
        simulation.train(groups)
        turns.append((drawn_s - began_s, time.perf_counter() - drawn_s))
    actor, learner = zip(*turns[WARM_UP:], strict=True)
    return median(actor), median(learner)


def side_by_side(updates: int, models: Path, scratch: Path) -> tuple[float, float]:
    """Return what `lock_step` does, of an actor and a learner that run at once and exchange nothing."""
    simulation = Simulation(RUN, models, scratch)
    groups = simulation.batch(0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_batches, 1, models).result()  # all is imported
        actor = pool.submit(_batches, updates, models)
        turns = []
        for _ in range(updates):
            began_s = time.perf_counter()
            simulation.train(groups)
            turns.append(time.perf_counter() - began_s)
        return median(actor.result()), median(turns)


def _batches(number: int, models: Path) -> list[float]:
    """Return the seconds that each of so many batches of rollouts takes."""
    with tempfile.TemporaryDirectory() as scratch:
        simulation = Simulation(RUN, models, Path(scratch))
        seconds = []
        for update in range(number):
            began_s = time.perf_counter()
            simulation.batch(update)
            seconds.append(time.perf_counter() - began_s)
        return seconds


def asynchronous(updates: int, directory: Path) -> tuple[float, float]:
    """Return the mean seconds from update to update, and the share of them that the learner waited for data."""
    settings = {
        "demo.num_actors": 1,
        "learner.total_updates": updates,
        "learner.groups_per_update": GROUPS_PER_UPDATE,
        "actor.group_size": GROUP_SIZE,
        "actor.groups_per_batch": GROUPS_PER_UPDATE,
        "limiter.samples_per_insert": 1.0,
        "limiter.min_size": 2 * GROUPS_PER_UPDATE,
        "table.reuse_limit": 1,
    }
    with demo_process(directory, settings) as demo:
        demo.finish(timeout_s=600)
        lines = [json.loads(line) for line in (demo.directory / "learner/metrics.jsonl").read_text().splitlines()]
    counted = lines[WARM_UP:]
    seconds = sum(seconds for line in counted for name, seconds in line.items() if name.startswith("time/"))
    return seconds / len(counted), sum(line["time/sample_wait_s"] for line in counted) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=150)
    updates = parser.parse_args().updates
    if updates <= WARM_UP:
        parser.error(f"--updates must be above the {WARM_UP} that are not counted")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shutil.copytree(DEMO_MODEL, scratch / "models/running_sums-0")
        actor_s, learner_s = lock_step(updates, scratch / "models", scratch)
        both_s = actor_s + learner_s
        busy_actor_s, busy_learner_s = side_by_side(updates, scratch / "models", scratch)
        update_s, idle = asynchronous(updates, scratch)
    print(f"lock-step: a batch of rollouts {actor_s:.3f} s, an update {learner_s:.3f} s, together {both_s:.3f} s")
    bound = both_s / max(busy_actor_s, busy_learner_s)
    print(f"side by side: {busy_actor_s:.3f} s and {busy_learner_s:.3f} s: this machine grants {bound:.2f} x")
    print(f"asynchronous: {update_s:.3f} s from update to update, of which the learner is idle for {idle:.1%}")
    print(f"{both_s / update_s:.2f} x as fast as lock-step")


if __name__ == "__main__":
    main()
