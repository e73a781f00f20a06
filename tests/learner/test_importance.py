"""Weighted draws, corrected: the expected gradient is that of uniform draws."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from buffer.types import Sample
from learner.collate import collate
from learner.importance import importance_weights
from tests.learner.builders import make_trainer, plain_samples

SHARES = (0.5, 0.25, 0.125, 0.125)


def test_weights_are_inverse_probabilities_of_mean_1() -> None:
    weights = importance_weights([0.5, 0.25, 0.125], 1.0)

    assert weights is not None
    assert weights.tolist() == pytest.approx([2 / 14 * 3, 4 / 14 * 3, 8 / 14 * 3])


def test_half_an_exponent_takes_roots() -> None:
    weights = importance_weights([0.04, 0.01], 0.5)

    assert weights is not None
    assert weights.tolist() == pytest.approx([5 / 7.5, 10 / 7.5])


def test_groups_that_were_chosen_without_lots_count_1() -> None:
    weights = importance_weights([1.0, 0.2, 0.6], 1.0)

    assert weights is not None
    assert weights.tolist() == pytest.approx([1.0, 1.5, 0.5])


@pytest.mark.parametrize(
    ("probabilities", "exponent"), [((1.0, 1.0), 1.0), ((0.1, 0.1), 1.0), ((0.1, 0.9), 0.0), ((1.0, 0.1), 1.0)]
)
def test_equal_weights_change_nothing(probabilities: tuple[float, ...], exponent: float) -> None:
    assert importance_weights(probabilities, exponent) is None


def _gradient(model_dir: Path, samples: list[Sample], *, correction: float, budget: int = 10_000) -> Tensor:
    trainer = make_trainer(model_dir, objective="reinforce", sampler_correction=correction, micro_batch_tokens=budget)
    metrics = trainer.update(collate(samples, clock=0))
    scale = max(1.0, metrics["gradient/norm"])
    return torch.cat(
        [scale * p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None]
    ).double()


@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_corrected_draw_weighs_groups_as_a_uniform_one_does(model_dir: Path, budget: int) -> None:
    """Every group drawn at its share, 8 times in all, against every group once: same direction only when corrected."""
    groups = [plain_samples(seed, num_groups=1)[0] for seed in range(4)]
    counts = [round(8 * share) for share in SHARES]
    drawn = [
        sample.model_copy(
            update={
                "group": sample.group.model_copy(update={"group_id": f"g{seed}-{copy}"}),
                "info": sample.info.model_copy(update={"probability": share}),
            }
        )
        for seed, (sample, share, count) in enumerate(zip(groups, SHARES, counts, strict=True))
        for copy in range(count)
    ]
    uniform = _gradient(model_dir, groups, correction=1.0)

    def cosine(correction: float) -> float:
        gradient = _gradient(model_dir, drawn, correction=correction, budget=budget)
        return float(torch.nn.functional.cosine_similarity(uniform, gradient, dim=0))

    assert cosine(1.0) == pytest.approx(1.0, abs=1e-6)
    assert cosine(0.0) < 0.999
