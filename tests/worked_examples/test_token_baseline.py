"""arXiv 2602.07078: the published numbers of the logit-gradient proxy and of the token baseline, and its optimality."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.objectives.advantages import group_mean, no_baseline
from learner.objectives.objective import Advantage
from learner.objectives.token_baseline import optimal_token_baseline, squared_logit_gradient
from learner.scoring import other_squared_probs
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import one_batch, padded

WANTED = frozenset({Column.OTHER_SQUARED_PROBS})

# a group of three of lengths 4, 3, 2, and a group of one
PROBS = [[0.9, 0.5, 0.8, 0.6], [0.4, 0.7, 0.9], [0.6, 0.3], [0.5, 0.5]]
SUMS_OF_SQUARES = [[0.82, 0.38, 0.66, 0.45], [0.30, 0.54, 0.82], [0.45, 0.28], [0.4, 0.4]]
REWARDS = [1.0, 0.0, 1.0, 1.0]
GROUP = [0, 0, 0, 1]


def batch(
    probs: list[list[float]],
    sums_of_squares: list[list[float]],
    rewards: list[float],
    group: list[int],
    mask: list[list[int]] | None = None,
) -> Tokens:
    """Tokens with the probability of the drawn one, and the sum of squares over the whole vocabulary."""
    others = [
        [total - p * p for p, total in zip(*row, strict=True)] for row in zip(probs, sums_of_squares, strict=True)
    ]
    tokens = one_batch(policy=probs, behavior=probs, rewards=rewards, mask=mask, group=group)
    return cleaned(replace(tokens, columns={Column.OTHER_SQUARED_PROBS: padded(others, math.nan)}), WANTED)


def rows(values: Tensor, lengths: Sequence[int]) -> list[float]:
    return [value for row, length in zip(values.tolist(), lengths, strict=True) for value in row[:length]]


def proxy_of(logits: list[float], chosen: int) -> float:
    """The squared norm of d log pi / d logits, as the learner computes it from float32 logits."""
    logprobs, ids = torch.tensor([logits]).log_softmax(-1), torch.tensor([chosen])
    tokens = replace(
        one_batch(policy=[[0.5]], behavior=[[0.5]], rewards=[1.0]),
        logprobs=logprobs[:, chosen, None],
        columns={Column.OTHER_SQUARED_PROBS: other_squared_probs(logprobs, ids)[:, None]},
    )
    return squared_logit_gradient(tokens).item()


@pytest.mark.parametrize(
    ("logits", "chosen", "norm"),
    [
        ([2.0, 1.0, 0.0], 0, 0.180061),
        ([2.0, 1.0, 0.0], 2, 1.330482),
        ([5.0, 0.0, 0.0, -1.0], 0, 0.000341),
        ([0.0, 0.0, 0.0, 0.0], 1, 0.75),
        ([1.5, 0.0, -1.0], 0, 0.087862),
        ([1.5, 0.0, -1.0], 1, 1.278271),
        ([1.5, 0.0, -1.0], 2, 1.494397),
    ],
)
def test_the_proxy_is_the_squared_norm_of_the_gradient_by_the_logits(
    logits: list[float], chosen: int, norm: float
) -> None:
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(leaf.log_softmax(-1)[chosen], leaf)

    assert proxy_of(logits, chosen) == pytest.approx(norm, abs=1e-6)
    assert proxy_of(logits, chosen) == pytest.approx(gradient.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "norm"), [([8.1, 0.3, 0.2], 9.13e-7), ([6.03, 1.27, -0.4, 2.2], 0.001468926), ([40.0, 0.0], 3.6e-35)]
)
def test_the_proxy_of_a_confident_token_does_not_cancel(logits: list[float], norm: float) -> None:
    assert proxy_of(logits, 0) == pytest.approx(norm, rel=2e-3)  # 1 - 2 pi + sum pi^2 is 22 % off in the first


def test_a_shift_of_the_logits_leaves_the_proxy_alone() -> None:
    assert proxy_of([3.0, 1.0, -2.0], 1) == pytest.approx(proxy_of([7.0, 5.0, 2.0], 1), rel=1e-5)


def test_group_of_three_and_a_group_of_one() -> None:
    tokens = batch(PROBS, SUMS_OF_SQUARES, REWARDS, GROUP)

    advantage = optimal_token_baseline()(tokens)

    norms = [0.02, 0.38, 0.06, 0.25, 0.5, 0.14, 0.02, 0.25, 0.68, 0.4, 0.4]
    assert rows(squared_logit_gradient(tokens), [4, 3, 2, 2]) == pytest.approx(norms, abs=1e-6)
    expected = [0.649351, 0.324873, 0.589286, 1.0, -0.350649, -0.675127, -0.410714, 0.649351, 0.324873, 1.0, 1.0]
    assert rows(advantage, [4, 3, 2, 2]) == pytest.approx(expected, abs=1e-6)
    assert not advantage[~tokens.mask].any()


def test_importance_weights_enter_squared() -> None:
    weights = padded([[1.0, 2.0, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0], [1.0] * 4, [1.0] * 4], 1.0)

    def weight(tokens: Tokens) -> Tensor:
        return weights

    advantage = optimal_token_baseline(weight=weight)(batch(PROBS, SUMS_OF_SQUARES, REWARDS, GROUP))

    expected = [0.316456, 0.096892, 0.151194, 1.0, -0.683544, -0.903108, -0.848806, 0.316456, 0.096892, 1.0, 1.0]
    assert rows(advantage, [4, 3, 2, 2]) == pytest.approx(expected, abs=1e-6)


def test_a_tool_gap_aligns_siblings_by_the_tokens_that_they_generated() -> None:
    tokens = batch(
        [[0.5] * 5, [0.5] * 5],
        [[0.4] * 5, [0.5] * 5],
        [1.0, 0.0],
        [0, 0],
        mask=[[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]],
    )

    first, second = optimal_token_baseline()(tokens).tolist()

    assert first == pytest.approx([0.555556, 0.0, 0.0, 0.555556, 1.0], abs=1e-6)
    assert second == pytest.approx([-0.444444, -0.444444, 0.0, 0.0, 0.0], abs=1e-6)


def test_a_prefix_that_all_siblings_were_sure_of_has_the_mean_as_its_baseline() -> None:
    tokens = batch([[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [1.0, 0.0], [0, 0])

    assert rows(optimal_token_baseline()(tokens), [2, 2]) == pytest.approx([0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize(
    ("baseline", "variance"), [(no_baseline, 0.166200), (group_mean, 0.043800), (optimal_token_baseline(), 0.032419)]
)
def test_the_baseline_minimises_the_variance_of_the_gradient(baseline: Advantage, variance: float) -> None:
    # one-token answers, each as often as the policy (.5, .3, .2) draws it: sums over the group are expectations
    policy, rewards = [0.5, 0.3, 0.2], [1.0, 0.0, 0.5]
    actions = [0] * 5 + [1] * 3 + [2] * 2
    total = sum(p * p for p in policy)
    tokens = batch([[policy[a]] for a in actions], [[total]] * 10, [rewards[a] for a in actions], [0] * 10)

    scores = torch.eye(3)[actions] - torch.tensor(policy)  # d log pi(a) / d logits
    gradients = scores * baseline(tokens)

    assert gradients.mean(0).tolist() == pytest.approx([0.2, -0.18, -0.02], abs=1e-6)
    assert (gradients - gradients.mean(0)).square().sum(-1).mean().item() == pytest.approx(variance, abs=1e-6)
