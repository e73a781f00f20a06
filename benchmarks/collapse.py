"""How often the first updates on fresh scratchpad addition collapse at a rate of 1.6e-3 (docs/staleness.md, "Missed").

python -m benchmarks.collapse      ten minutes on one core: four methods, two also with a harder clip, five seeds each
"""

import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.staleness import MODELS
from benchmarks.study.simulation import Run, Simulation
from learner.step import SKIPPED

UPDATES = 45
SEEDS = range(200, 205)
CASES = (("grpo", 1.0), ("trm", 1.0), ("minpro", 1.0), ("stalewise", 1.0), ("grpo", 0.3), ("stalewise", 0.3))
"""Method and largest norm of the gradient."""


def collapses(method: str, grad_clip_norm: float, seed: int) -> bool:
    """Whether hardly an answer (2 %) is right any more in each of the last three batches."""
    run = Run(
        task="scratchpad_addition",
        objective=method,
        updates=250,
        lr=1.6e-3,
        schedule="linear",
        seed=seed,
        grad_clip_norm=grad_clip_norm,
    )
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        simulation = Simulation(run, MODELS, Path(scratch))
        for update in range(UPDATES):
            groups = simulation.batch(update)
            rewards.append(fmean(trajectory.reward for group in groups for trajectory in group.trajectories))
            try:
                simulation.train(groups)
            except tuple(SKIPPED):  # as a learner does: the batch is spent
                continue
    return max(rewards[-3:]) < 0.02


def main() -> None:
    """Print a line a case."""
    for method, grad_clip_norm in CASES:
        collapsed = sum(collapses(method, grad_clip_norm, seed) for seed in SEEDS)
        print(f"{method}, gradient clipped at {grad_clip_norm:g}: {collapsed} of {len(SEEDS)} collapsed", flush=True)


if __name__ == "__main__":
    main()
