"""The optimal token baseline against a plain loop, its invariants, and its place in the recipes."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.objectives.advantages import group_mean
from learner.objectives.recipe import AdvantageName
from learner.objectives.recipes import RECIPES, build_objective
from learner.objectives.token_baseline import optimal_token_baseline, squared_logit_gradient
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import ALL_PARTS, ROWS, Row, gradient, padded, tokens_of
from tests.learner.objectives.plain_loops import num_tokens

COLUMNS = frozenset({Column.OTHER_SQUARED_PROBS})
NAMES = ("optimal_token_baseline", "optimal_token_baseline_truncated")
WITH_ADVANTAGE = sorted(name for name, recipe in RECIPES.items() if "advantage" in recipe.model_fields)


def plain_advantage(
    rows: Sequence[Row], i: int, t: int, *, cap: float | None = None, token_rewards: Sequence[list[float]] | None = None
) -> float:
    """A of token t of trajectory i, from lists of trained tokens."""

    def energy(row: Row, k: int) -> float:
        total = 0.0
        for s in row.trained[: k + 1]:
            weight = 1.0 if cap is None else min(math.exp(row.log_ratios[s]), cap)
            total += ((1 - math.exp(row.logprobs[s])) ** 2 + row.other_squares[s]) * weight**2
        return total

    def to_go(j: int, k: int) -> float:
        later = [] if token_rewards is None else [token_rewards[j][s] for s in rows[j].trained[k:]]
        return rows[j].reward + sum(later)

    k = rows[i].trained.index(t)
    alive = [j for j, row in enumerate(rows) if row.group == rows[i].group and len(row.trained) > k]
    episodes = {rows[j].episode for j in alive}
    if len(episodes) == 1:
        return to_go(i, k)
    up = down = 0.0
    for episode in episodes:
        members = [j for j in alive if rows[j].episode == episode]
        up += statistics.fmean(energy(rows[j], k) * to_go(j, k) for j in members)
        down += statistics.fmean(energy(rows[j], k) for j in members)
    return to_go(i, k) - up / down


def plain(
    rows: Sequence[Row], *, cap: float | None = None, token_rewards: Sequence[list[float]] | None = None
) -> Tensor:
    values = torch.zeros(len(rows), max(len(row.mask) for row in rows))
    for i, row in enumerate(rows):
        for t in row.trained:
            values[i, t] = plain_advantage(rows, i, t, cap=cap, token_rewards=token_rewards)
    return values


def small(tokens: Tokens) -> Tokens:
    return cleaned(tokens, COLUMNS)


# log pi must not exceed 0 for a probability to be meant
REAL = tuple(replace(row, log_ratios=[min(log, 0.3) for log in row.log_ratios]) for row in ROWS)


@pytest.mark.parametrize(("name", "cap"), [(NAMES[0], None), (NAMES[1], 2.0)])
def test_it_equals_its_plain_loop_with_holes_episodes_and_unequal_groups(name: str, cap: float | None) -> None:
    rows = tuple(replace(row, log_ratios=[2 * log for log in row.log_ratios]) for row in ROWS)  # some beyond the cap

    found = AdvantageName(name).piece(small(tokens_of(rows)))

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(rows, cap=cap), rtol=1e-5, atol=1e-6)


def test_token_rewards_count_from_their_token_on() -> None:
    token_rewards = [[0.1 * (t + 1) * (-1) ** i for t in range(len(row.mask))] for i, row in enumerate(REAL)]
    tokens = small(replace(tokens_of(REAL), token_rewards=padded(token_rewards, math.nan)))

    found = optimal_token_baseline()(tokens)

    torch.testing.assert_close(found, plain(REAL, token_rewards=token_rewards), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_multiplies_each_token_with_its_own_advantage(name: str) -> None:
    tokens = tokens_of()

    total = build_objective("reinforce", {"advantage": name})(tokens, {}).total

    expected = -plain(ROWS, cap=2.0 if name == NAMES[1] else None) / num_tokens(ROWS)
    torch.testing.assert_close(gradient(total, tokens.logprobs), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_no_gradient_of_its_own(name: str) -> None:
    assert not AdvantageName(name).piece(small(tokens_of())).requires_grad


def test_equal_rewards_leave_an_advantage_to_a_lone_tail_alone() -> None:
    rows = tuple(replace(row, reward=0.7) for row in REAL[:3])  # 5, 3 and 5 trained tokens: two alive at the end

    assert optimal_token_baseline()(small(tokens_of(rows))).abs().max().item() < 1e-6
    lone = optimal_token_baseline()(small(tokens_of(rows[:2])))
    assert lone[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.7, 0.7], abs=1e-6)


def test_a_constant_reward_moves_only_what_has_no_sibling_alive() -> None:
    tokens = small(tokens_of(REAL[:2]))

    shift = optimal_token_baseline()(replace(tokens, rewards=tokens.rewards + 3)) - optimal_token_baseline()(tokens)

    assert shift[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 3.0, 3.0], abs=1e-5)
    assert shift[1].tolist() == pytest.approx([0.0] * 5, abs=1e-5)


def test_equal_energies_and_lengths_give_the_mean_of_the_group() -> None:
    rows = tuple(replace(row, log_ratios=[0.1] * 3, mask=[1] * 3, ages=[0] * 3) for row in REAL[:3])
    tokens = small(tokens_of(rows))

    found = optimal_token_baseline()(tokens)

    torch.testing.assert_close(found, group_mean(tokens).expand(3, 3))


def test_the_scale_of_the_energies_does_not_matter() -> None:
    tokens = small(tokens_of(REAL))

    def seven(tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.logprobs, 7.0)

    torch.testing.assert_close(
        optimal_token_baseline(weight=seven)(tokens), optimal_token_baseline()(tokens), rtol=1e-5, atol=1e-6
    )


def test_the_proxy_keeps_its_bounds_and_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(200, 5, generator=generator).double()).softmax(-1)  # row after row, each token once drawn
    squares = probs.square()
    tokens = Tokens(
        logprobs=probs.log(),
        behavior_logprobs=probs.log(),
        mask=torch.ones(200, 5, dtype=torch.bool),
        rewards=torch.zeros(200),
        group=torch.arange(200),
        episode=torch.arange(200),
        age_updates=torch.zeros(200, 5, dtype=torch.int64),
        columns={Column.OTHER_SQUARED_PROBS: squares.sum(-1, keepdim=True) - squares},
    )

    norms = squared_logit_gradient(tokens)

    assert (norms >= (1 - probs).square() * 5 / 4 - 1e-12).all()
    assert (norms <= 2 * (1 - probs).square() + 1e-12).all()
    torch.testing.assert_close((probs * norms).sum(-1), 1 - squares.sum(-1))


@pytest.mark.parametrize("name", WITH_ADVANTAGE)
def test_every_recipe_with_an_advantage_takes_it_and_asks_for_its_column(name: str) -> None:
    tokens = tokens_of(REAL)
    plain_columns = build_objective(name, {}).columns
    objective = build_objective(name, {"advantage": NAMES[1]})

    loss = objective(tokens, {"variance": 0.04, "variance_ema": 0.04})

    assert objective.columns == plain_columns | COLUMNS
    assert loss.total.isfinite()
    assert gradient(loss.total, tokens.logprobs).isfinite().all()
    objective.next_multipliers(tokens, {"variance": 0.04, "variance_ema": 0.04})  # reads the same advantage


def test_a_constraint_alone_asks_for_the_column_of_its_advantage() -> None:
    alone = {**ALL_PARTS, "policy_coefficient": 0, "advantage": NAMES[0]}

    assert build_objective("stalewise", alone).columns >= COLUMNS
    assert not COLUMNS & build_objective("stalewise", {**alone, "lambda_max": 0}).columns
