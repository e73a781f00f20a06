"""The Bellman residual of ReVal, and the part of it in `stalewise`."""

from dataclasses import replace

import pytest
import torch

from learner.objectives.advantages import leave_one_out, no_baseline
from learner.objectives.bellman import REVAL_COLUMNS, reval_residual
from learner.objectives.recipes import build_objective
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import ROWS, gradient, tokens_of


def test_reval_ignores_the_behaviour_log_probs() -> None:
    tokens = tokens_of()
    other = replace(tokens, behavior_logprobs=torch.full_like(tokens.behavior_logprobs, -3.0))
    objective = build_objective("reval", {})

    assert torch.equal(objective(tokens, {}).total, objective(other, {}).total)


def at_the_reference_without_reward() -> Tokens:
    tokens = tokens_of(behind_mask=0.0)
    unit, first = tokens.columns[Column.UNIT_LOGPROBS], tokens.columns[Column.FIRST_LOGIT]
    reference = {
        Column.REFERENCE_LOGPROBS: unit.detach().clone(),
        Column.REFERENCE_FIRST_LOGIT: first.detach().clone(),
    }
    return replace(tokens, rewards=torch.zeros(len(ROWS)), columns={**tokens.columns, **reference})


def test_reval_is_at_rest_at_the_reference_without_reward() -> None:
    tokens = at_the_reference_without_reward()

    total = build_objective("reval", {})(tokens, {}).total

    assert total.item() == 0.0
    for column in (Column.UNIT_LOGPROBS, Column.FIRST_LOGIT):
        assert not gradient(total, tokens.columns[column]).any()


def test_tbrm_moves_the_policy_even_there() -> None:
    tokens = at_the_reference_without_reward()

    total = build_objective("tbrm", {})(tokens, {}).total

    assert total.item() > 0.0
    assert gradient(total, tokens.columns[Column.FIRST_LOGIT]).any()


def test_centring_on_the_group_learns_at_a_larger_beta_than_leaving_one_out() -> None:
    """In groups of G episodes: beta with group_mean is beta G / (G - 1) with leave_one_out."""
    tokens = tokens_of(tuple(row for row in ROWS if row.group == 0))
    episodes = len({row.episode for row in ROWS if row.group == 0})

    by_mean = build_objective("reval", {"beta": 0.2, "centring": "group_mean"})(tokens, {}).total
    larger = 0.2 * episodes / (episodes - 1)
    by_others = build_objective("reval", {"beta": larger, "centring": "leave_one_out"})(tokens, {}).total

    torch.testing.assert_close(by_mean, by_others)


def test_the_residual_starts_at_the_first_trained_token() -> None:
    tokens = cleaned(tokens_of(), REVAL_COLUMNS)
    row = ROWS[2]  # its first position is a hole

    delta = reval_residual(beta=0.5, centred=no_baseline)(tokens)[2].item()

    later = sum(row.unit[t] - row.reference[t] for t in (2, 3, 4, 5))
    assert delta == pytest.approx(row.first_logit - row.reference_first_logit + later - row.reward / 0.5, rel=1e-5)


def test_shifting_the_first_logit_shifts_the_residual_by_as_much() -> None:
    tokens = cleaned(tokens_of(), REVAL_COLUMNS)
    shifted = replace(tokens, columns={**tokens.columns, Column.FIRST_LOGIT: tokens.columns[Column.FIRST_LOGIT] + 0.25})
    residual = reval_residual(beta=0.5, centred=no_baseline)

    torch.testing.assert_close(residual(shifted) - residual(tokens), torch.full((len(ROWS),), 0.25))


def test_beta_scaled_loss_is_beta_squared_times_the_loss() -> None:
    tokens = tokens_of()

    plain = build_objective("reval", {"beta": 0.1})(tokens, {}).total
    scaled = build_objective("reval", {"beta": 0.1, "scale_by_beta": True})(tokens, {}).total

    assert scaled.item() == pytest.approx(0.01 * plain.item(), rel=1e-6)


def test_stalewise_bellman_part_is_token_mean_reinforce_at_the_reference() -> None:
    tokens = tokens_of(behind_mask=0.0)
    unit, first = tokens.columns[Column.UNIT_LOGPROBS], tokens.columns[Column.FIRST_LOGIT]
    at_reference = replace(
        tokens,
        columns={
            Column.UNIT_LOGPROBS: unit,
            Column.REFERENCE_LOGPROBS: unit.detach().clone(),
            Column.FIRST_LOGIT: first,
            Column.REFERENCE_FIRST_LOGIT: first.detach().clone(),
        },
    )
    options = {"policy_coefficient": 0, "lambda_max": 0, "bellman_coefficient": 0.5, "beta": 0.07}

    total = build_objective("stalewise", options)(at_reference, {}).total

    centred, count = leave_one_out(tokens)[:, 0], tokens.num_tokens
    torch.testing.assert_close(gradient(total, first), -0.5 * centred / count, rtol=1e-4, atol=1e-6)
    later = tokens.mask & (tokens.mask.cumsum(-1) > 1)
    expected = torch.where(later, -0.5 * centred[:, None] / count, 0.0)
    torch.testing.assert_close(gradient(total, unit), expected, rtol=1e-4, atol=1e-6)
