"""Trained groups carry the ratios of their own tokens, whole groups only, within the budget."""

from pathlib import Path

import numpy as np
import torch

from learner.collate import collate
from learner.trained import trained_groups
from tests.learner.builders import make_trainer, mixed_samples


def test_ratios_are_those_of_each_trajectory_and_zero_behind_the_mask(model_dir: Path) -> None:
    samples, trainer = mixed_samples(), make_trainer(model_dir)
    batch = collate(samples, clock=3)
    with torch.no_grad():
        logprobs = trainer.policy.forward(batch, frozenset()).scores.logprobs.numpy()

    trainer.update(batch)
    groups = trained_groups(samples, trainer.log_ratios, clock=3, max_tokens=1_000)

    assert [(group.group_id, group.version, group.times_sampled) for group in groups] == [("a", 3, 1), ("b", 3, 4)]
    rows = [trajectory for group in groups for trajectory in group.trajectories]
    originals = [trajectory for sample in samples for trajectory in sample.group.trajectories]
    for row, original, logs in zip(rows, originals, logprobs, strict=True):
        expected = np.where(original.response_mask, logs[: len(original.response_ids)] - original.behavior_logprobs, 0)
        np.testing.assert_allclose(row.log_ratios, expected, atol=1e-6)
        assert row.response_ids.tolist() == original.response_ids.tolist()


def test_groups_beyond_the_budget_are_left_out_whole() -> None:
    samples = mixed_samples()
    ratios = torch.zeros(5, 20)
    first, second = (sample.group.num_response_tokens for sample in samples)

    def sent(max_tokens: int) -> int:
        return len(trained_groups(samples, ratios, clock=3, max_tokens=max_tokens))

    assert [sent(0), sent(first - 1), sent(first), sent(first + second - 1), sent(first + second)] == [0, 0, 1, 1, 2]
