"""arXiv 2512.23075: its error bounds on two policies whose error is known exactly, and its published numbers."""

import itertools
import math

import pytest
import torch

from learner.objectives.bounds import (
    classical,
    coupling,
    error_bounds,
    mixed_kl,
    mixed_tv,
    pinsker_marginal_kl,
    pinsker_marginal_tv,
)


def rounded(bounds: dict[str, float]) -> dict[str, object]:
    return {name: pytest.approx(value, abs=1e-6) for name, value in bounds.items()}


def test_the_published_numbers_at_4096_tokens() -> None:
    length, delta, pinsker = 4096, 1e-4, math.sqrt(1e-4 / 2)

    assert classical(length=length, max_tv=pinsker) == pytest.approx(1677.312, abs=1e-3)
    assert coupling(length=length, max_tv=pinsker) == pytest.approx(113.8382, abs=1e-4)
    assert pinsker_marginal_kl(length=length, max_kl=delta) == pytest.approx(34.9461, abs=1e-4)
    assert mixed_kl(length=length, max_kl=delta, sequence_kl=0.01) == pytest.approx(8.192, abs=1e-6)
    assert classical(length=length, max_tv=5e-3) == pytest.approx(838.656, abs=1e-6)
    assert coupling(length=length, max_tv=5e-3) == pytest.approx(79.91, abs=1e-6)
    assert pinsker_marginal_tv(length=length, max_tv=5e-3, max_kl=delta) == pytest.approx(24.7106, abs=1e-4)
    assert mixed_tv(length=length, max_tv=5e-3, sequence_tv=0.05) == pytest.approx(4.096, abs=1e-9)


def sequence_tv(behavior: float, policy: float, length: int) -> float:
    """Of sequences of independent coin flips."""
    total = 0.0
    for flips in itertools.product((0, 1), repeat=length):
        total += abs(math.prod(behavior if f else 1 - behavior for f in flips) - math.prod(
            policy if f else 1 - policy for f in flips
        ))  # fmt: skip
    return total / 2


def kl(behavior: float, policy: float) -> float:
    return behavior * math.log(behavior / policy) + (1 - behavior) * math.log((1 - behavior) / (1 - policy))


def test_example_a_three_coins_all_heads() -> None:
    assert sequence_tv(0.5, 0.6, 3) == pytest.approx(0.148, abs=1e-9)
    assert kl(0.5, 0.6) == pytest.approx(0.020411, abs=1e-6)

    bounds = error_bounds(
        max_tv=0.1,
        max_kl=kl(0.5, 0.6),
        sequence_kl=3 * kl(0.5, 0.6),
        sequence_tv=0.148,
        mean_tv=torch.full((3,), 0.1, dtype=torch.float64),
    )

    assert dict(bounds) == rounded(
        {
            "classical": 0.12,
            "coupling": 0.12,
            "pm_kl": 0.098553,
            "pm_tv": 0.097556,
            "mix_kl": 0.212117,
            "mix_tv": 0.1776,
            "adaptive": 0.097147,
            "best": 0.097147,
        }
    )
    assert bounds["best"] > 0.016  # the error


def test_example_b_four_coins_at_least_three_heads() -> None:
    assert sequence_tv(0.7, 0.5, 4) == pytest.approx(0.3392, abs=1e-9)
    assert kl(0.7, 0.5) == pytest.approx(0.082283, abs=1e-6)

    bounds = error_bounds(
        max_tv=0.2,
        max_kl=kl(0.7, 0.5),
        sequence_kl=4 * kl(0.7, 0.5),
        sequence_tv=0.3392,
        mean_tv=torch.full((4,), 0.2, dtype=torch.float64),
    )

    assert dict(bounds) == rounded(
        {
            "classical": 0.96,
            "coupling": 0.96,
            "pm_kl": 0.682333,
            "pm_tv": 0.672801,
            "mix_kl": 1.316526,
            "mix_tv": 1.08544,
            "adaptive": 0.670534,
            "best": 0.670534,
        }
    )
    assert bounds["best"] > 0.0136
