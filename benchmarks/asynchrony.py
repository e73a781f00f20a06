"""What it is worth that actor and learner do not wait for each other (goal R10).

Asynchronous: the demo's processes (service, Redis, one actor, learner), each rollout trained on once, as many rollouts
in a batch as an update takes. Lock-step: the same actor, collation and step in turns in one process, the weights handed
over by a file: it is spared the service. Side by side: this actor and this learner at once, in two processes that have
nothing to do with each other: what the machine itself grants. With equal costs and two real cores that would be 2.

The demo's model is so small that the loop costs as much as the learning. --hidden and --layers make another one, warmed
up for the same task; with --batches 2 an update follows on two batches of rollouts, one of which is trained on, where
a batch of rollouts costs half an update. --publish-dtype bfloat16 sends the weights as one does to vLLM.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.asynchrony [--updates 150] [--hidden 160 --layers 4 --batches 2]
"""

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.study.simulation import GROUP_SIZE, GROUPS_PER_UPDATE, Run, Simulation
from services.make_model import make_model
from tests.e2e.demo_process import demo_process

RUN = Run(objective="stalewise", lr=4e-4, schedule="linear", seed=0)
DEMO_MODEL = Path(__file__).parents[1] / "models/running-sums"
WARM_UP = 20
"""Updates of each side that are not counted."""
SUPERVISED_STEPS = 200
"""For a model that is made here: it has to be right now and then, or there is nothing to learn."""


def lock_step(updates: int, batches: int, models: Path, scratch: Path) -> tuple[float, float]:
    """Return the mean seconds that the rollouts of an update and the update take."""
    simulation = Simulation(RUN, models, scratch)
    turns = []
    for update in range(updates):
        began_s = time.perf_counter()
        for _ in range(batches):
            groups = simulation.batch(update)
        drawn_s = time.perf_counter()
        simulation.train(groups)
        turns.append((drawn_s - began_s, time.perf_counter() - drawn_s))
    actor, learner = zip(*turns[WARM_UP:], strict=True)
    return fmean(actor), fmean(learner)


def side_by_side(updates: int, batches: int, models: Path, scratch: Path) -> tuple[float, float]:
    """Return what `lock_step` does, of an actor and a learner that run at once and exchange nothing."""
    simulation = Simulation(RUN, models, scratch)
    groups = simulation.batch(0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_batches, 1, models).result()  # all is imported
        actor = pool.submit(_batches, batches * updates, models)
        turns = []
        for _ in range(updates):
            began_s = time.perf_counter()
            simulation.train(groups)
            turns.append(time.perf_counter() - began_s)
        return batches * fmean(actor.result()[WARM_UP:]), fmean(turns[WARM_UP:])


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


def asynchronous(
    updates: int, batches: int, publish_dtype: str, models: Path, directory: Path
) -> tuple[float, dict[str, float]]:
    """Return the mean seconds from update to update, and what share of them the learner spent on what."""
    settings = {
        "run.model": models / f"{RUN.task}-0",
        "demo.num_actors": 1,
        "learner.total_updates": updates,
        "learner.groups_per_update": GROUPS_PER_UPDATE,
        "learner.publish_dtype": publish_dtype,
        "actor.group_size": GROUP_SIZE,
        "actor.groups_per_batch": GROUPS_PER_UPDATE,
        "learner.selector": '{kind = "lifo"}',  # what is not trained on is what is old
        "limiter.samples_per_insert": 1.0 / batches,
        "limiter.min_size": 2 * GROUPS_PER_UPDATE,
        "table.reuse_limit": 1,
    }
    with demo_process(directory, settings) as demo:
        demo.finish(timeout_s=600)
        lines = [json.loads(line) for line in (demo.directory / "learner/metrics.jsonl").read_text().splitlines()]
    counted = lines[WARM_UP:]
    names = [name for name in counted[0] if name.startswith("time/")]
    means = {name: fmean(line.get(name, 0.0) for line in counted) for name in names}
    seconds = sum(means.values())
    return seconds, {name.removeprefix("time/").removesuffix("_s"): mean / seconds for name, mean in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--hidden", type=int, help="hidden size of a model made here, in place of the demo's")
    parser.add_argument("--layers", type=int, default=4, help="its layers")
    parser.add_argument("--batches", type=int, default=1, help="of rollouts for an update")
    parser.add_argument("--publish-dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    updates, batches = arguments.updates, arguments.batches
    if updates <= WARM_UP:
        parser.error(f"--updates must be above the {WARM_UP} that are not counted")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = scratch / "models"
        if arguments.hidden is None:
            shutil.copytree(DEMO_MODEL, models / f"{RUN.task}-0")
        else:
            accuracy = make_model(
                models / f"{RUN.task}-0",
                seed=0,
                warmup_steps=SUPERVISED_STEPS,
                hidden_size=arguments.hidden,
                num_layers=arguments.layers,
            )
            print(f"made a model that is right in {accuracy:.1%} of its answers", flush=True)
        actor_s, learner_s = lock_step(updates, batches, models, scratch)
        both_s = actor_s + learner_s
        print(f"lock-step: rollouts {actor_s:.3f} s, an update {learner_s:.3f} s, together {both_s:.3f} s", flush=True)
        busy_actor_s, busy_learner_s = side_by_side(updates, batches, models, scratch)
        bound = both_s / max(busy_actor_s, busy_learner_s)
        print(
            f"side by side: {busy_actor_s:.3f} s and {busy_learner_s:.3f} s: this machine grants {bound:.2f} x",
            flush=True,
        )
        update_s, shares = asynchronous(updates, batches, arguments.publish_dtype, models, scratch)
    print(f"asynchronous: {update_s:.3f} s from update to update, of which the learner spends")
    print("  " + ", ".join(f"{share:.1%} on {name}" for name, share in shares.items()))
    print(f"{both_s / update_s:.2f} x as fast as lock-step")


if __name__ == "__main__":
    main()
