"""Weighted draws, corrected: the expected gradient is that of uniform draws."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Weighted
from buffer.table import SampleRequest, TableSettings
from buffer.types import Sample
from buffer.weighting import PriorityWeighting
from learner.collate import collate
from learner.importance import importance_weights
from tests.factories import RUN_ID, make_group
from tests.learner.builders import as_sample, make_trainer, plain_samples

SHARES = (0.5, 0.25, 0.125, 0.125)


def test_weights_are_one_over_candidates_times_probability() -> None:
    samples = [as_sample(make_group(name), probability=p, num_candidates=5) for name, p in (("a", 0.5), ("b", 0.125))]

    weights = importance_weights(collate(samples, clock=0).draw_rates, 1.0)

    assert weights is not None
    assert weights.tolist() == pytest.approx([1 / 2.5, 1 / 0.625])


def test_half_an_exponent_takes_roots() -> None:
    weights = importance_weights([0.25, 4.0], 0.5)

    assert weights is not None
    assert weights.tolist() == pytest.approx([2.0, 0.5])


@pytest.mark.parametrize(
    ("draw_rates", "exponent"), [((1.0, 1.0), 1.0), ((4.0, 0.25), 0.0), ((0.0, 1.0), 0.0), ((49 * (1 / 49),), 1.0)]
)
def test_equal_weights_change_nothing(draw_rates: tuple[float, ...], exponent: float) -> None:
    assert importance_weights(draw_rates, exponent) is None


def test_a_probability_that_rounds_to_0_is_a_weight_without_bound_and_no_crash() -> None:
    (sample,) = [as_sample(make_group("a"), probability=0.0, num_candidates=5)]

    weights = importance_weights(collate([sample], clock=0).draw_rates, 1.0)

    assert weights is not None
    assert weights.isinf().all()  # the update is skipped for its gradient, by name


@pytest.mark.parametrize("num_groups", [1, 2, 4, 16])
def test_over_many_draws_every_group_counts_alike_however_few_a_draw_has(num_groups: int) -> None:
    """32 groups of weight 10 and 32 of weight 1: what they add up to, against what uniform draws would."""
    table = MemoryTable(
        TableSettings(weighting=PriorityWeighting(exponent=1.0)),
        RateLimiterSettings(min_size=num_groups, error_buffer=1e9),
        RUN_ID,
        clock=lambda: 0.0,
        rng=random.Random(0),
    )
    table.advance_version(0)
    table.insert([make_group(f"{kind}{number}") for number in range(32) for kind in ("heavy", "light")])
    table.update_priorities({f"heavy{number}": 10.0 for number in range(32)})
    table.update_priorities({f"light{number}": 1.0 for number in range(32)})
    num_draws, counted = 8000 // num_groups, Counter[str]()
    for number in range(num_draws):
        request = SampleRequest(
            request_id=f"d{number}", num_groups=num_groups, selector=Weighted(by="priority"), learner_version=0
        )
        batch = collate(table.sample(request), clock=0)
        weights = importance_weights(batch.draw_rates, 1.0)
        assert weights is not None
        for name, weight in zip(dict.fromkeys(group_id for group_id, _ in batch.keys), weights.tolist(), strict=True):
            counted[name[:5]] += weight

    expected = num_draws * num_groups / 2
    assert counted["heavy"] == pytest.approx(expected, rel=0.02)
    assert counted["light"] == pytest.approx(expected, rel=0.1)  # 700 draws of them


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
                "info": sample.info.model_copy(update={"probability": share, "num_candidates": 4}),
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
