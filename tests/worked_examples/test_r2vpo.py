"""arXiv 2601.03320: examples R1, R2, R4 and the closed form of R3."""

import math
from dataclasses import replace

import pytest
import torch

from learner.objectives.aggregation import mean_over_tokens
from learner.objectives.penalties import ratio_variance
from learner.objectives.ratios import bounded_ratio
from learner.objectives.recipes import build_objective
from learner.tokens import Tokens, cleaned
from tests.learner.objectives.batches import gradient, one_batch

FRESH, STALE = [1.02, 0.97, 1.05, 0.99], [1.8, 0.4, 1.3, 0.7]
OPEN = {"advantage": "none", "lambda_max": 100.0}


def from_ratios(ratios: list[float], advantages: list[float]) -> Tokens:
    """One token a trajectory."""
    return one_batch(policy=[[0.25 * ratio] for ratio in ratios], behavior=[[0.25] for _ in ratios], rewards=advantages)


def coefficients(tokens: Tokens, multiplier: float) -> list[float]:
    """d objective / d log pi of each token, before averaging."""
    objective = build_objective("r2vpo", OPEN)
    total = objective(tokens, {"variance": multiplier, "variance_ema": 0.0}).total
    found: list[float] = (-len(tokens.rewards) * gradient(total, tokens.logprobs))[:, 0].tolist()
    return found


@pytest.mark.parametrize(
    ("multiplier", "advantage", "expected"),
    [
        (0.5, 1.0, [0.36, 0.75, 0.96, 1.0, 0.96, 0.75, 0.0, -1.25]),
        (0.5, -1.0, [-0.04, -0.25, -0.64, -1.0, -1.44, -2.25, -4.0, -6.25]),
        (0.04, 1.0, [0.2128, 0.52, 0.8128, 1.0, 1.1808, 1.44, 1.84, 2.2]),
        (0.04, -1.0, [-0.1872, -0.48, -0.7872, -1.0, -1.2192, -1.56, -2.16, -2.8]),
    ],
)
def test_r1_coefficient_table(multiplier: float, advantage: float, expected: list[float]) -> None:
    tokens = from_ratios([0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5], [advantage] * 8)

    assert coefficients(tokens, multiplier) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("advantage", "expected"), [(1.0, [0.2, 0.5, 1.0, 0.0, 0.0, 0.0]), (-1.0, [0.0, 0.0, -1.0, -1.5, -2.0, -2.5])]
)
def test_r1_ppo_rows_off_the_kinks(advantage: float, expected: list[float]) -> None:
    tokens = from_ratios([0.2, 0.5, 1.0, 1.5, 2.0, 2.5], [advantage] * 6)

    total = build_objective("grpo", {"advantage": "none"})(tokens, {}).total

    assert (-6 * gradient(total, tokens.logprobs))[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_r2_one_batch_and_one_dual_step() -> None:
    tokens = from_ratios([1.10, 0.90, 1.50, 0.60], [1.0, 1.0, -1.0, -1.0])
    objective = build_objective("r2vpo", {**OPEN, "dual_step": 0.5, "target_variance": 0.04})
    multipliers = {"variance": 0.5, "variance_ema": 0.04}

    loss = objective(tokens, multipliers)

    assert loss.parts["policy"].item() == pytest.approx(0.025, abs=1e-6)
    assert loss.parts["variance"].item() == pytest.approx(0.5 * 0.1075, abs=1e-6)
    assert loss.total.item() == pytest.approx(0.078750, abs=1e-6)
    assert coefficients(tokens, 0.5) == pytest.approx([0.99, 0.99, -2.25, -0.36], abs=1e-6)
    moved = objective.next_multipliers(tokens, multipliers)
    assert moved == pytest.approx({"variance": 0.533750, "variance_ema": 0.1075}, abs=1e-6)


def test_r3_the_bandit_optimum_is_stationary() -> None:
    behavior, advantages, multiplier = [0.5, 0.3, 0.2], [1.0, 0.0, -1.0], 1.952562
    logits = torch.tensor([0.589626, 0.276953, 0.133421]).log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    # one token a trajectory, each action as often as the behaviour policy takes it: 5, 3 and 2 of 10
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    blank = from_ratios([1.0] * 10, [advantages[a] for a in actions.tolist()])
    tokens = Tokens(
        logprobs=logprobs[actions][:, None],
        behavior_logprobs=torch.tensor(behavior).log()[actions][:, None],
        mask=blank.mask,
        rewards=blank.rewards,
        group=blank.group,
        episode=blank.episode,
        age_updates=blank.age_updates,
    )

    total = build_objective("r2vpo", OPEN)(tokens, {"variance": multiplier, "variance_ema": 0.0}).total

    assert gradient(total, logits).abs().max().item() < 1e-5
    variance = mean_over_tokens(tokens, ratio_variance(bounded_ratio(max_log_ratio=5.0))(cleaned(tokens, ())))
    assert variance.item() == pytest.approx(0.04, abs=1e-5)
    assert -total.item() + multiplier * 0.04 == pytest.approx(0.3 + 0.156205, abs=1e-5)  # mean A, and the gain


def test_r4_one_multiplier_reweights_fresh_and_stale_tokens() -> None:
    ages = torch.tensor([[0]] * 4 + [[9]] * 4)
    tokens = replace(from_ratios(FRESH + STALE, [1.0] * 8), age_updates=ages)
    mixed, fresh = (build_objective(name, {**OPEN, "dual_step": 1.0}) for name in ("r2vpo", "r2vpo_fresh"))
    start = {"variance": 0.5, "variance_ema": 0.04}

    moved = mixed.next_multipliers(tokens, start)["variance"]
    watched = mixed(tokens, start).watched

    assert watched["variance_fresh"].item() == pytest.approx(0.000975, abs=1e-6)
    assert watched["variance_stale"].item() == pytest.approx(0.295, abs=1e-6)
    assert moved == pytest.approx(0.607988, abs=1e-6)
    assert fresh.next_multipliers(tokens, start)["variance"] == pytest.approx(0.460975, abs=1e-6)
    expected = [0.995194, 1.005385, 0.986161, 1.002038, 0.048996, 0.691834, 0.825770, 0.955355]
    assert coefficients(tokens, moved) == pytest.approx(expected, abs=2e-6)


def test_log_ratios_outside_the_bound_are_taken_at_the_bound() -> None:
    tokens = from_ratios([math.exp(-9.0), 1.0], [1.0, 1.0])

    values = ratio_variance(bounded_ratio(max_log_ratio=5.0))(cleaned(tokens, ()))

    assert values[:, 0].tolist() == pytest.approx([(math.exp(-5) - 1) ** 2, 0.0], rel=1e-6)
