"""Some updates on recorded batches by as many ranks as torchrun starts: run.py MODEL_DIR RUN_DIR FIRST LAST [--compile]

The run goes on from the newest checkpoint, if there is one, and leaves one. The first rank writes what it measured.
"""

import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from learner.checkpoint import Checkpoints
from learner.collate import Batch, collate
from learner.distributed import Ranks, joined, whole
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.policy import Policy
from learner.settings import ComputeSettings, LearnerSettings, OptimizerSettings
from learner.sharding import ShardedPolicy
from learner.step import Trainer
from learner.tokens import NonFiniteTokens
from tests.learner.builders import make_policy, mixed_samples, plain_samples

MICRO_BATCH_TOKENS = 24
"""Several micro-batches an update, and unequal ones."""


def train(
    model_dir: Path, run_dir: Path, ranks: Ranks, first: int, last: int, *, compiled: bool = False
) -> list[dict[str, float]]:
    """Do the updates [first, last) and return their metrics."""
    compute = ComputeSettings(compile=compiled)
    load = partial(make_policy, model_dir, micro_batch_tokens=MICRO_BATCH_TOKENS, compute=compute)
    policy: Policy = load() if ranks.size == 1 else ShardedPolicy(load, ranks=ranks)
    trainer = Trainer(
        policy=policy,
        objective=build_objective("stalewise", {"lambda_max": 0.1, "bellman_coefficient": 1.0}),
        settings=LearnerSettings(
            optimizer=OptimizerSettings(lr=1e-2, warmup_updates=2, schedule="linear", grad_clip_norm=0.5),
            total_updates=20,
            reference_reset_every=3,
            max_closed_updates=1_000,
        ),
        diagnose=diagnose,
        now=time.monotonic,
    )
    checkpoints = Checkpoints(run_dir, keep=1, model_fingerprint="f" * 64, resolved_settings={}, ranks=ranks)
    newest = checkpoints.newest()
    if newest is not None:
        checkpoints.restore(newest, trainer)
    assert trainer.progress.updates == first
    measured = []
    for number in range(first, last):
        # one of them has a trajectory less than there are ranks
        samples = plain_samples(number, num_groups=3) if number % 2 else mixed_samples()
        batch = ranks.from_first(collate(samples, clock=trainer.progress.clock + 2))
        assert isinstance(batch, Batch)
        if number == first + 1:  # an update that is skipped between two passes of the model leaves no rank waiting
            with suppress(NonFiniteTokens):
                trainer.update(replace(batch, rewards=batch.rewards * math.nan))
        measured.append({**trainer.update(batch), **_gradients_of_single_rows(trainer, batch)})
    checkpoints.save(trainer)
    return measured


def _gradients_of_single_rows(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Return the norm of the gradient of each trajectory alone: one rank, or none, has anything to run again."""
    norms = {}
    for row in range(len(batch.keys)):
        trainer.optimizer.zero_grad()
        forward = trainer.policy.forward(batch, frozenset())
        trainer.policy.backward(batch, forward, forward.scores.logprobs[row].sum())
        parameters = trainer.policy.model.parameters()
        norms[f"gradient/row_{row}"] = whole(torch.nn.utils.clip_grad_norm_(parameters, math.inf)).item()
    return norms


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, run, begin, end, *flags = sys.argv[1:]
    with joined("cpu") as all_ranks:
        found = train(Path(model), Path(run), all_ranks, int(begin), int(end), compiled="--compile" in flags)
        # every rank must have computed the same, from the same scores
        for name in ("loss/total", "gradient/norm"):
            values = torch.tensor([metrics[name] for metrics in found])
            assert all_ranks.sum(values).div(all_ranks.size).allclose(values, rtol=0, atol=1e-7), name
        if all_ranks.is_first:
            Path(run, "metrics.json").write_text(json.dumps(found))
