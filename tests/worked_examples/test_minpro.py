"""arXiv 2601.22718: examples M1 to M3."""

import pytest
import torch

from learner.objectives.ratios import capped_prefix_ratio, prefix_minimum, prefix_ratio, soft_clip, token_ratio
from learner.objectives.recipes import build_objective
from learner.tokens import Tokens, cleaned
from tests.learner.objectives.batches import gradient, one_batch


def m1(advantage: float = 1.0) -> Tokens:
    ratios = [1.1, 0.5, 0.95, 1.3, 2.0]
    return one_batch(policy=[[0.2 * ratio for ratio in ratios]], behavior=[[0.2] * 5], rewards=[advantage])


def test_m1_prefix_minimum_and_surrogate() -> None:
    tokens = cleaned(m1(), ())

    assert prefix_minimum(tokens)[0].tolist() == pytest.approx([1.0, 1.1, 0.5, 0.5, 0.5], abs=1e-6)
    assert prefix_ratio(tokens)[0].tolist() == pytest.approx([1.1, 0.55, 0.475, 0.65, 1.0], abs=1e-6)
    assert capped_prefix_ratio(tokens)[0].tolist() == pytest.approx([1.1, 0.5, 0.475, 0.65, 1.0], abs=1e-6)


@pytest.mark.parametrize(("low", "expected"), [(1.0, [1.1, 0.55, 0.475, 0.65, 1.0]), (0.2, [1.1, 0.8, 0.8, 0.8, 1.0])])
def test_m1_weights(low: float, expected: list[float]) -> None:
    tokens = m1()

    weights = soft_clip(prefix_ratio, low=low, high=0.28)(cleaned(tokens, ()))

    assert weights[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_m1_token_weights_without_the_prefix() -> None:
    tokens = m1()

    weights = soft_clip(token_ratio, low=0.2, high=0.28)(cleaned(tokens, ()))

    assert weights[0].tolist() == pytest.approx([1.1, 0.8, 0.95, 1.28, 1.28], abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "coefficients"), [(1.0, [1.1, 0.55, 0.475, 0.65, 1.0]), (-1.0, [-1.1, 0.0, 0.0, 0.0, -1.0])]
)
def test_m1_hard_variant_drops_what_follows_a_bad_token_of_a_bad_answer(
    advantage: float, coefficients: list[float]
) -> None:
    tokens = m1(advantage)

    total = build_objective("minpro_hard", {"advantage": "none"})(tokens, {}).total

    assert (-5 * gradient(total, tokens.logprobs))[0].tolist() == pytest.approx(coefficients, abs=1e-6)


def test_m2_loss_and_coefficients_with_a_mask_hole() -> None:
    tokens = one_batch(
        policy=[[0.45, 0.40, 0.60], [0.30, 0.05, 0.50, 0.80]],
        behavior=[[0.5, 0.5, 0.5], [0.2, 0.2, 0.5, 0.5]],
        rewards=[1.0, -1.0],
        mask=[[1, 1, 1], [1, 0, 1, 1]],
    )

    total = build_objective("minpro", {"advantage": "none"})(tokens, {}).total

    assert total.item() == pytest.approx(-0.140860, abs=1e-6)
    assert (-gradient(total, tokens.logprobs)).tolist() == [
        pytest.approx([0.15, 0.12, 0.16, 0.0], abs=1e-6),
        pytest.approx([-0.213333, 0.0, -0.213333, -0.213333], abs=1e-6),
    ]


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_m3_constant_drift_does_not_grow_with_length(length: int) -> None:
    tokens = one_batch(policy=[[0.99 * 0.5] * length], behavior=[[0.5] * length], rewards=[1.0])

    last = prefix_ratio(cleaned(tokens, ()))[0, -1]

    torch.testing.assert_close(last, torch.tensor(0.980100), rtol=0, atol=1e-6)
