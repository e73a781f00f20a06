"""What holds for every recipe, whatever the numbers: at ratio 1, behind the mask, at the edge of float range."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.objectives.aggregation import mean_over_sequences_of_means, mean_over_sequences_of_sums, mean_over_tokens
from learner.objectives.objective import Objective, Reduction
from learner.objectives.recipe import AdvantageName
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import Column, MissingColumns, NonFiniteTokens, Tokens, cleaned
from tests.learner.objectives.batches import ALL_PARTS, NAN, ROWS, TOKEN_COLUMNS, gradient, tokens_of, whole


def half_of_mean_over_tokens(tokens: Tokens, values: Tensor) -> Tensor:
    return mean_over_tokens(tokens, values) / 2


AT_RATIO_1: dict[str, tuple[str, Reduction]] = {
    "rloo": ("leave_one_out", mean_over_sequences_of_sums),
    "dr_grpo": ("group_mean", mean_over_sequences_of_sums),
    "gspo": ("standardised", mean_over_sequences_of_means),
    "luspo": ("standardised", mean_over_sequences_of_sums),
    "cispo": ("standardised", mean_over_tokens),
    "tis_ppo": ("standardised", mean_over_tokens),
    "icepop": ("standardised", mean_over_sequences_of_means),
    "m2po": ("standardised", mean_over_tokens),
    "minirl": ("group_mean", mean_over_sequences_of_sums),
    "topr": ("none", mean_over_sequences_of_means),
    "opmd": ("group_mean", half_of_mean_over_tokens),
    "reinforce": ("group_mean", mean_over_tokens),
    "tis": ("standardised", mean_over_tokens),
    "grpo": ("standardised", mean_over_sequences_of_means),
    "dapo": ("standardised", mean_over_tokens),
    "minpro": ("standardised", mean_over_tokens),
    "minpro_capped": ("standardised", mean_over_tokens),
    "minpro_hard": ("standardised", mean_over_tokens),
    "trm": ("standardised", mean_over_sequences_of_sums),
    "trm_ln": ("standardised", mean_over_sequences_of_sums),
    "trm_ser": ("standardised", mean_over_sequences_of_sums),
    "r2vpo": ("standardised", mean_over_tokens),
    "r2vpo_fresh": ("standardised", mean_over_tokens),
    "stalewise": ("standardised", mean_over_tokens),
}
"""The advantage and the aggregation whose product is a token's coefficient when pi = behaviour."""

NOT_MEANT = {"reval", "tbrm", "asymre"}
"""Bellman recipes: the behaviour policy does not enter, so there is no ratio to be 1. AsymRE shifts its baseline."""

MULTIPLIERS = {"variance": 0.1, "variance_ema": 0.04}
EVERY_RECIPE = sorted(RECIPES)


def loss_and_gradients(objective: Objective, tokens: Tokens) -> list[Tensor]:
    total = objective(tokens, MULTIPLIERS).total
    leaves = [tokens.logprobs, tokens.columns[Column.UNIT_LOGPROBS], tokens.columns[Column.FIRST_LOGIT]]
    return [total.detach(), *(gradient(total, leaf) for leaf in leaves)]


def test_every_recipe_says_whether_the_ratio_1_invariant_is_meant() -> None:
    assert AT_RATIO_1.keys() | NOT_MEANT == RECIPES.keys()


@pytest.mark.parametrize("name", sorted(AT_RATIO_1))
def test_at_ratio_1_a_coefficient_is_advantage_times_aggregation_weight(name: str) -> None:
    tokens = tokens_of(on_policy=True, behind_mask=0.0)
    advantage_name, aggregate = AT_RATIO_1[name]
    advantage = AdvantageName(advantage_name).piece(cleaned(tokens, ()))
    weights = torch.zeros_like(tokens.logprobs, requires_grad=True)

    grad = gradient(whole(name)(tokens, MULTIPLIERS).total, tokens.logprobs)

    expected = -gradient(aggregate(tokens, weights * advantage), weights)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", EVERY_RECIPE)
@pytest.mark.parametrize("behind_mask", [NAN, math.inf, -math.inf, -9999.0])
def test_what_stands_behind_the_mask_is_never_read(name: str, behind_mask: float) -> None:
    objective = whole(name)

    with_zeros = loss_and_gradients(objective, tokens_of(behind_mask=0.0))
    with_garbage = loss_and_gradients(objective, tokens_of(behind_mask=behind_mask))

    for clean, dirty in zip(with_zeros, with_garbage, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in EVERY_RECIPE),
        ("stalewise", ALL_PARTS),
        ("grpo", {"reference_kl": 0.04, "advantage": "optimal_token_baseline_truncated"}),
    ],
)
def test_finite_garbage_of_each_column_is_not_read_nor_a_trajectory_without_trained_tokens(
    name: str, options: dict[str, object]
) -> None:
    rows = (*ROWS, replace(ROWS[0], mask=[0] * 5, group=3, episode=7))
    objective, tokens = build_objective(name, options), tokens_of(rows, behind_mask=0.0)
    generator = torch.Generator().manual_seed(0)

    def with_garbage(values: Tensor) -> Tensor:
        trained = tokens.mask if values.dim() == 2 else tokens.mask.any(-1)
        garbage = 2e5 * torch.rand(values.shape, generator=generator) - 1e5
        return torch.where(trained, values.detach(), garbage).requires_grad_()

    dirty = replace(
        tokens,
        logprobs=with_garbage(tokens.logprobs),
        behavior_logprobs=with_garbage(tokens.behavior_logprobs).detach(),
        rewards=with_garbage(tokens.rewards).detach(),
        columns={column: with_garbage(values) for column, values in tokens.columns.items()},
    )

    for clean, found in zip(loss_and_gradients(objective, tokens), loss_and_gradients(objective, dirty), strict=True):
        assert torch.equal(clean, found)


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_more_padding_changes_nothing(name: str) -> None:
    tokens = tokens_of()
    blank = torch.full((len(ROWS), 3), NAN)

    def widened(values: Tensor) -> Tensor:
        return torch.cat([blank, values, blank], -1)

    wide = replace(
        tokens,
        logprobs=widened(tokens.logprobs),
        behavior_logprobs=widened(tokens.behavior_logprobs),
        mask=widened(tokens.mask.float()).nan_to_num(0).bool(),
        age_updates=widened(tokens.age_updates.float()).nan_to_num(-1).long(),
        columns={name: widened(value) if name in TOKEN_COLUMNS else value for name, value in tokens.columns.items()},
    )
    objective = whole(name)

    narrow_total, wide_total = objective(tokens, MULTIPLIERS).total, objective(wide, MULTIPLIERS).total

    torch.testing.assert_close(narrow_total, wide_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(narrow_total, tokens.logprobs), gradient(wide_total, tokens.logprobs), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_the_order_of_trajectories_does_not_matter_and_rows_do_not_leak(name: str) -> None:
    order = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    objective, tokens, shuffled = whole(name), tokens_of(), tokens_of(tuple(ROWS[i] for i in order))

    straight, mixed = loss_and_gradients(objective, tokens), loss_and_gradients(objective, shuffled)

    torch.testing.assert_close(straight[0], mixed[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(straight[1][order], mixed[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_a_wild_row_leaves_the_coefficients_of_other_groups_alone(name: str) -> None:
    wild = tuple(replace(row, log_ratios=[9.0] * len(row.mask)) if row.group == 0 else row for row in ROWS)
    objective = whole(name)

    calm, stormy = loss_and_gradients(objective, tokens_of()), loss_and_gradients(objective, tokens_of(wild))

    assert torch.equal(calm[1][3:], stormy[1][3:])


@pytest.mark.parametrize("name", EVERY_RECIPE)
@pytest.mark.parametrize("extreme", [-9999.0, -60.0, -1e-30, 0.0])
@pytest.mark.parametrize("field", ["logprobs", "behavior_logprobs"])
def test_extreme_log_probs_give_a_finite_loss_and_gradient(name: str, field: str, extreme: float) -> None:
    tokens = tokens_of()
    with torch.no_grad():
        for values in (
            (tokens.logprobs, tokens.columns[Column.UNIT_LOGPROBS])
            if field == "logprobs"
            else (tokens.behavior_logprobs,)
        ):
            values[0, 1] = extreme
            values[3, 0] = extreme

    for value in loss_and_gradients(whole(name), tokens):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", EVERY_RECIPE)
@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
def test_a_trained_token_that_is_not_finite_is_refused_by_place(name: str, broken: float) -> None:
    tokens = tokens_of()
    with torch.no_grad():
        tokens.logprobs[2, 3] = broken

    with pytest.raises(NonFiniteTokens, match=r"logprobs is .* at trajectory 2, token 3"):
        whole(name)(tokens, MULTIPLIERS)


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_what_a_loss_reports_is_detached_and_its_gates_are_full_sized(name: str) -> None:
    tokens = tokens_of()

    loss = whole(name)(tokens, MULTIPLIERS)

    assert loss.total.requires_grad
    assert not any(value.requires_grad for value in (*loss.parts.values(), *loss.watched.values()))
    assert all(gate.shape == tokens.mask.shape and gate.dtype == torch.bool for gate in loss.gates.values())


def test_a_reward_that_is_not_finite_is_refused() -> None:
    tokens = replace(tokens_of(), rewards=torch.tensor([1.0, NAN, 0, 0, 0, 0, 0, 0]))

    with pytest.raises(NonFiniteTokens, match=r"rewards is nan at trajectory 1 of"):
        build_objective("grpo", {})(tokens, {})


def test_a_missing_column_is_named() -> None:
    tokens = replace(tokens_of(), columns={Column.FIRST_LOGIT: torch.zeros(len(ROWS))})

    with pytest.raises(MissingColumns, match="reference_first_logit, reference_logprobs, unit_logprobs"):
        build_objective("reval", {})(tokens, {})


@pytest.mark.parametrize("name", EVERY_RECIPE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    objective, half = whole(name), tokens_of(dtype=dtype)
    exact = replace(
        half,
        logprobs=half.logprobs.detach().float().requires_grad_(),
        behavior_logprobs=half.behavior_logprobs.float(),
        columns={name: value.detach().float().requires_grad_() for name, value in half.columns.items()},
    )

    rounded, full = loss_and_gradients(objective, half), loss_and_gradients(objective, exact)

    assert rounded[0].dtype == torch.float32
    assert torch.equal(rounded[0], full[0])
    for found, wanted in zip(rounded[1:], full[1:], strict=True):
        assert torch.equal(found.float(), wanted.to(dtype).float())


@pytest.mark.parametrize("name", sorted(AT_RATIO_1.keys() - {"topr"}))
def test_a_group_of_equal_rewards_asks_nothing_of_the_policy(name: str) -> None:
    tokens = tokens_of(tuple(replace(row, reward=0.7) for row in ROWS[:3]))

    loss = whole(name)(tokens, MULTIPLIERS)

    assert abs(loss.parts["policy"].item()) < 1e-6
