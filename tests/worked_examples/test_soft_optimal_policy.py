"""ReVal and TBRM find pi_ref exp(r / beta) / Z from fixed off-policy data, on a tree small enough to enumerate.

Vocabulary 4, horizon 4: 85 states with free logits, 256 leaves of which 32 have reward 1. The data is every leaf once,
as a uniform policy draws them, so that a batch is an expectation. Two wrong variants must fail where the right ones
pass.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.objectives.recipes import build_objective
from learner.tokens import Column, Tokens

VOCAB, HORIZON, BETA = 4, 4, 0.25
LEAVES = torch.tensor(list(itertools.product(range(VOCAB), repeat=HORIZON)))  # [256, 4] actions
_GENERATOR = torch.Generator().manual_seed(0)
REFERENCE = torch.randn(85, VOCAB, generator=_GENERATOR, dtype=torch.float64)  # [state, action] logits
REWARDS = (torch.rand(len(LEAVES), generator=_GENERATOR, dtype=torch.float64) < 0.15).double()


def _states() -> Tensor:
    """[256, 4]: the number of the state before each action; states are numbered level after level."""
    offset, levels, number = 0, [], torch.zeros(len(LEAVES), dtype=torch.int64)
    for t in range(HORIZON):
        levels.append(offset + number)
        offset, number = offset + VOCAB**t, number * VOCAB + LEAVES[:, t]
    return torch.stack(levels, -1)


STATES = _states()

FirstLogit = Callable[[Tensor], Tensor]
"""Logits of all states -> [256], what stands in the column `first_logit` of either model."""


def logprobs(logits: Tensor) -> Tensor:
    """[256, 4]: log pi of every action of every leaf."""
    return logits.log_softmax(-1)[STATES, LEAVES]


def first_logit(logits: Tensor) -> Tensor:
    return logits[0, LEAVES[:, 0]]


def first_logit_with_detached_value(logits: Tensor) -> Tensor:
    """Wrong: V(s_1) without gradient."""
    return logprobs(logits)[:, 0] + logits[0].logsumexp(-1).detach()


def first_logit_without_value(logits: Tensor) -> Tensor:
    """Wrong: no V(s_1)."""
    return logprobs(logits)[:, 0]


def batch(logits: Tensor, first: FirstLogit) -> Tokens:
    unit = logprobs(logits)
    return Tokens(
        logprobs=unit,
        behavior_logprobs=torch.full_like(unit, 1 / VOCAB).log(),
        mask=torch.ones(unit.shape, dtype=torch.bool),
        rewards=REWARDS,
        group=torch.arange(len(LEAVES)),
        episode=torch.arange(len(LEAVES)),
        age_updates=torch.full(unit.shape, 500),
        columns={
            Column.UNIT_LOGPROBS: unit,
            Column.REFERENCE_LOGPROBS: logprobs(REFERENCE),
            Column.FIRST_LOGIT: first(logits),
            Column.REFERENCE_FIRST_LOGIT: first(REFERENCE),
        },
    )


def descended(name: str, *, first: FirstLogit = first_logit, lr: float = 0.03, steps: int = 500) -> Tensor:
    """The logits [85, 4] after `steps` of Adam from the reference, on the same data every time."""
    logits = REFERENCE.clone().requires_grad_()
    objective = build_objective(name, {"beta": BETA} | ({"centring": "none"} if name == "reval" else {}))
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch(logits, first), {}).total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return logits.detach()


def optimal() -> tuple[Tensor, float]:
    """log pi* [256] and log Z."""
    tilted = logprobs(REFERENCE).sum(-1) + REWARDS / BETA
    return tilted.log_softmax(0), tilted.logsumexp(0).item()


def divergence_from_optimal(logits: Tensor) -> float:
    """KL(pi* || pi) in nats."""
    best, _ = optimal()
    return (best.exp() * (best - logprobs(logits).sum(-1))).sum().item()


def value_gained(logits: Tensor) -> float:
    """V - V_ref at the root."""
    return (logits[0].logsumexp(-1) - REFERENCE[0].logsumexp(-1)).item()


def test_the_tree_is_the_one_whose_numbers_are_known() -> None:
    best, log_z = optimal()

    assert int(REWARDS.sum()) == 32
    assert (logprobs(REFERENCE).sum(-1).exp() @ REWARDS).item() == pytest.approx(0.138911, abs=1e-6)
    assert log_z == pytest.approx(2.133617, abs=1e-6)
    assert (best.exp() @ REWARDS).item() == pytest.approx(0.898040, abs=1e-6)
    assert divergence_from_optimal(REFERENCE) == pytest.approx(1.458543, abs=1e-6)


def test_reval_converges_from_fixed_data_and_its_value_to_log_z() -> None:
    logits = descended("reval")

    assert divergence_from_optimal(logits) < 1e-3
    assert value_gained(logits) == pytest.approx(optimal()[1], abs=0.05)


def test_tbrm_converges_from_fixed_data_and_its_value_to_log_z() -> None:
    logits = descended("tbrm")

    assert divergence_from_optimal(logits) < 1e-3
    assert logits[0].logsumexp(-1).item() == pytest.approx(optimal()[1], abs=0.05)


@pytest.mark.parametrize(
    ("wrong", "divergence"), [(first_logit_with_detached_value, 0.3), (first_logit_without_value, 0.2)]
)
def test_without_a_value_that_learns_the_policy_is_a_wrong_one(wrong: FirstLogit, divergence: float) -> None:
    assert divergence_from_optimal(descended("reval", first=wrong)) > divergence
