"""Ratios, surrogates and aggregations, each by its own claim."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.objectives.aggregation import (
    maximum_by_sequence,
    mean_by_sequence,
    mean_over_sequences,
    mean_over_sequences_of_means,
    mean_over_sequences_of_sums,
    mean_over_tokens,
    sum_by_sequence,
    sum_over_sequences_per_token,
)
from learner.objectives.penalties import reference_k3
from learner.objectives.ratios import (
    banded,
    k1,
    k2,
    k3,
    log_ratio,
    prefix_minimum,
    prefix_ratio,
    proximal_ratio,
    proximal_to_behavior,
    sequence_product,
    token_ratio,
    truncated,
)
from learner.objectives.recipes import build_objective
from learner.objectives.surrogates import dual_clip, hard_clip, importance, score, weighted
from learner.tokens import Column
from tests.learner.objectives.batches import ROWS, from_logs, gradient, one_batch, tokens_of

ratio_rows = st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=3)


# ---- ratios


@given(ratio_rows)
@settings(max_examples=50, deadline=None)
def test_prefix_minimum_is_exclusive_bounded_and_ordered(rows: list[list[float]]) -> None:
    minima, ratios = prefix_minimum(from_logs(rows)), prefix_ratio(from_logs(rows))

    for i, row in enumerate(rows):
        for t in range(len(row)):
            expected = math.exp(min(row[:t], default=0.0))
            assert minima[i, t].item() == pytest.approx(expected, rel=1e-5)
            assert abs(math.log(ratios[i, t].item())) <= 2 * max(map(abs, row)) + 1e-4
            if t < 2:  # one token before: the minimum is the prefix
                assert ratios[i, t].item() == pytest.approx(math.exp(sum(row[: t + 1])), rel=1e-4)
        if all(log <= 0 for log in row):  # between the ratio of the prefix and that of the token
            assert math.exp(sum(row)) - 1e-5 <= ratios[i, len(row) - 1].item() <= math.exp(row[-1]) + 1e-5
        if all(log >= 0 for log in row):
            assert math.exp(row[-1]) - 1e-4 <= ratios[i, len(row) - 1].item() <= math.exp(sum(row)) * (1 + 1e-4)


def test_the_order_of_earlier_ratios_does_not_matter_to_a_prefix_weight() -> None:
    one, other = from_logs([[0.4, -0.3, 0.1, 0.2]]), from_logs([[0.1, 0.4, -0.3, 0.2]])

    torch.testing.assert_close(prefix_ratio(one)[0, 3], prefix_ratio(other)[0, 3])


def test_without_a_prefix_minpro_is_a_soft_clip_of_the_token_ratio() -> None:
    """One token an answer: the minimum is 1, and the loss that of CISPO with this clip."""
    tokens = one_batch(policy=[[0.9], [0.2], [0.5]], behavior=[[0.5]] * 3, rewards=[1.0, 0.0, 0.5], group=[0] * 3)
    clip = {"clip_low": 1.0, "clip_high": 0.28, "advantage": "standardised"}

    losses = [build_objective(name, clip)(tokens, {}).total for name in ("minpro", "cispo")]

    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradient(losses[0], tokens.logprobs), gradient(losses[1], tokens.logprobs))


def test_a_masked_token_neither_enters_nor_resets_the_prefix_minimum() -> None:
    tokens = from_logs([[-5.0, 0.2, -9.0, -0.1, 0.3]], mask=[[0, 1, 0, 1, 1]])

    assert prefix_minimum(tokens)[0].tolist() == pytest.approx(
        [1.0, 1.0, math.exp(0.2), math.exp(0.2), math.exp(-0.1)], rel=1e-6
    )


def test_a_band_holds_its_ends() -> None:
    tokens = from_logs([[0.0, math.log(1.5)]])

    assert banded(token_ratio, low=1.0, high=1.2)(tokens)[0].tolist() == [1.0, 0.0]
    assert banded(token_ratio, low=0.5, high=1.0)(tokens)[0].tolist() == [1.0, 0.0]


def test_prefix_weights_do_not_depend_on_later_tokens() -> None:
    short, long = from_logs([[0.1, -0.4, 0.3]]), from_logs([[0.1, -0.4, 0.3, -2.0]])

    torch.testing.assert_close(prefix_ratio(short), prefix_ratio(long)[:, :3])


@pytest.mark.parametrize("log", [-1000.0, 1000.0])
def test_log_ratios_stop_at_the_guard_and_stay_finite_when_squared_and_multiplied(log: float) -> None:
    tokens = replace(
        from_logs([[0.0, 0.0]]),
        logprobs=torch.full((1, 2), log, requires_grad=True),
        behavior_logprobs=torch.zeros(1, 2),
    )

    assert log_ratio(tokens).abs().tolist() == [[20.0, 20.0]]
    assert prefix_ratio(tokens).square().isfinite().all()
    assert not gradient(token_ratio(tokens).sum(), tokens.logprobs).any()


def test_the_product_of_a_sequence_has_the_guard_of_one_ratio() -> None:
    tokens = from_logs([[9.0] * 6, [-9.0] * 6, [0.1, 0.2, -0.1, 0.0, 0.0, 0.0]])

    expected = [math.exp(20.0), math.exp(-20.0), math.exp(0.2)]
    assert sequence_product(tokens)[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_ratios_by_the_proximal_policy_have_the_same_guard() -> None:
    tokens = replace(
        from_logs([[0.0, 0.0]]),
        logprobs=torch.tensor([[0.0, -1000.0]]),
        columns={Column.PROXIMAL_LOGPROBS: torch.tensor([[-1000.0, 0.0]])},
    )

    wild = [math.exp(20.0), math.exp(-20.0)]
    assert proximal_ratio(tokens)[0].tolist() == pytest.approx(wild, rel=1e-5)
    assert proximal_to_behavior(tokens)[0].tolist() == pytest.approx([math.exp(-20.0), 1.0], rel=1e-5)


def test_the_reference_penalty_has_the_guard_where_it_is_an_exponential_and_pulls_back_where_it_is_none() -> None:
    unit = torch.tensor([[-1000.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, -1000.0, -1.5]])
    columns = {Column.UNIT_LOGPROBS: unit, Column.REFERENCE_LOGPROBS: reference}
    tokens = replace(from_logs([[0.0] * 3]), columns=columns)

    penalties = reference_k3(tokens)

    assert penalties[0].tolist() == pytest.approx([math.exp(20.0) - 21, 999.0, math.exp(-0.5) - 0.5], rel=1e-5)
    assert gradient(penalties.sum(), unit)[0].tolist() == pytest.approx([0.0, 1.0, 1 - math.exp(-0.5)], rel=1e-5)


def test_k_statistics_at_a_hundred_and_at_a_hundredth() -> None:
    tokens = from_logs([[math.log(100), math.log(0.01)]])

    assert k1(tokens)[0].tolist() == pytest.approx([-4.605170, 4.605170], abs=1e-5)
    assert k2(tokens)[0].tolist() == pytest.approx([10.603796, 10.603796], abs=1e-5)
    assert k3(tokens)[0].tolist() == pytest.approx([94.394830, 3.615170], abs=1e-4)


def test_k1_and_k3_are_unbiased_under_the_behaviour_policy() -> None:
    behavior, policy = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.6, 0.1])
    tokens = from_logs([(policy / behavior).log().tolist()])

    assert (behavior * k1(tokens)).sum().item() == pytest.approx(0.207944, abs=1e-6)
    assert (behavior * k3(tokens)).sum().item() == pytest.approx(0.207944, abs=1e-6)
    assert (behavior * k2(tokens)).sum().item() == pytest.approx(0.216204, abs=1e-6)


def test_tiny_log_ratios_keep_their_k3() -> None:
    tokens = replace(from_logs([[0.0]]), logprobs=torch.tensor([[1e-3]]), behavior_logprobs=torch.zeros(1, 1))

    assert k3(tokens).item() == pytest.approx(5.0017e-7, rel=1e-3)  # exp(l) - 1 - l would lose it to rounding


def test_truncation_caps_from_above_only() -> None:
    tokens = from_logs([[math.log(5.0), math.log(0.1)]])

    assert truncated(token_ratio, cap=2.0)(tokens)[0].tolist() == pytest.approx([2.0, 0.1], rel=1e-6)


# ---- surrogates


def test_score_sends_its_gradient_through_the_log_prob_alone() -> None:
    tokens = tokens_of(behind_mask=0.0)

    values = score(token_ratio)(tokens, torch.full((len(ROWS), 1), 2.0))

    torch.testing.assert_close(gradient(values.sum(), tokens.logprobs), 2.0 * token_ratio(tokens).detach())


def test_a_weight_has_no_gradient_of_its_own() -> None:
    tokens = tokens_of(behind_mask=0.0)

    values = weighted(importance(token_ratio), token_ratio)(tokens, torch.full((len(ROWS), 1), 2.0))

    torch.testing.assert_close(gradient(values.sum(), tokens.logprobs), 2.0 * token_ratio(tokens).detach().square())


@pytest.mark.parametrize(
    ("ratio", "advantage", "value"),
    [(1.5, 1.0, 1.2), (0.5, 1.0, 0.5), (1.5, -1.0, -1.5), (0.5, -1.0, -0.8), (9.0, -1.0, -9.0)],
)
def test_hard_clip_is_the_pessimistic_branch(ratio: float, advantage: float, value: float) -> None:
    tokens = from_logs([[math.log(ratio)]])

    clipped = hard_clip(token_ratio, low=0.2, high=0.2)

    assert clipped(tokens, torch.tensor([[advantage]])).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("ratio", "advantage", "value"), [(9.0, -2.0, -6.0), (2.0, -2.0, -4.0), (9.0, 2.0, 18.0)])
def test_dual_clip_bounds_bad_answers_only(ratio: float, advantage: float, value: float) -> None:
    tokens = from_logs([[math.log(ratio)]])

    bounded = dual_clip(importance(token_ratio), floor=3.0)

    assert bounded(tokens, torch.tensor([[advantage]])).item() == pytest.approx(value, rel=1e-6)


# ---- aggregation


def test_the_name_of_a_reduction_is_its_denominator() -> None:
    tokens = from_logs([[0.0] * 3, [0.0] * 2, [0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [6.0, 99.0, 99.0]])
    by_sequence = torch.tensor([6.0, 9.0, 6.0])

    assert mean_over_tokens(tokens, values).item() == pytest.approx(3.5)
    assert mean_over_sequences_of_sums(tokens, values).item() == pytest.approx(7.0)
    assert mean_over_sequences_of_means(tokens, values).item() == pytest.approx(4.166667, abs=1e-6)
    assert mean_over_sequences(tokens, by_sequence).item() == pytest.approx(7.0)
    assert sum_over_sequences_per_token(tokens, by_sequence).item() == pytest.approx(3.5)


def test_a_batch_without_trained_tokens_has_no_loss() -> None:
    tokens = from_logs([[0.0, 0.0], [0.0]], mask=[[0, 0], [0]])

    for reduction in (mean_over_tokens, mean_over_sequences_of_means, mean_over_sequences_of_sums):
        assert reduction(tokens, torch.ones(2, 2)).item() == 0.0
    assert sum_over_sequences_per_token(tokens, torch.zeros(2)).item() == 0.0


def test_statistics_by_sequence_see_trained_tokens_only() -> None:
    tokens = from_logs([[0.0] * 3, [0.0] * 2], mask=[[1, 0, 1], [0, 0]])
    values = torch.tensor([[-3.0, 99.0, -1.0], [99.0, 99.0, 99.0]])

    assert maximum_by_sequence(tokens, values)[:, 0].tolist() == [-1.0, -math.inf]
    assert mean_by_sequence(tokens, values)[:, 0].tolist() == [-2.0, 0.0]
    assert sum_by_sequence(tokens, values)[:, 0].tolist() == [-4.0, 0.0]


def test_values_of_rejected_tokens_still_count_in_every_denominator() -> None:
    tokens = from_logs([[0.0] * 3, [0.0] * 2, [0.0]])
    kept = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [6.0, 0.0, 0.0]])

    assert mean_over_tokens(tokens, kept).item() == pytest.approx(2.0)
    assert mean_over_sequences_of_sums(tokens, kept).item() == pytest.approx(4.0)
    assert mean_over_sequences_of_means(tokens, kept).item() == pytest.approx(2.666667, abs=1e-6)


# ---- advantages
