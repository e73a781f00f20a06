"""Ratios, gates, aggregations, advantages and residuals, each by its own claim."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.objectives.advantages import group_mean
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
from learner.objectives.gates import bounded_second_moment, inside_band, inside_clip, sequence_maximum, sequence_mean
from learner.objectives.ratios import (
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
from learner.tokens import Column, Tokens, cleaned
from tests.learner.objectives.batches import ROWS, gradient, one_batch, tokens_of

ratio_rows = st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=3)


def from_logs(rows: list[list[float]], mask: list[list[int]] | None = None) -> Tokens:
    """A batch with these log-ratios."""
    tokens = one_batch(
        policy=[[1.0] * len(row) for row in rows],
        behavior=[[math.exp(-log) for log in row] for row in rows],
        rewards=[1.0] * len(rows),
        mask=mask,
    )
    return cleaned(tokens, ())


# ---- ratios


@given(ratio_rows)
@settings(max_examples=50, deadline=None)
def test_prefix_minimum_is_exclusive_bounded_and_ordered(rows: list[list[float]]) -> None:
    minima, ratios = prefix_minimum(from_logs(rows)), prefix_ratio(from_logs(rows))

    for i, row in enumerate(rows):
        for t in range(len(row)):
            expected = min(row[:t], default=0.0)
            assert minima[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert abs(math.log(ratios[i, t].item())) <= 2 * max(map(abs, row)) + 1e-4
        if all(log <= 0 for log in row):
            assert ratios[i, len(row) - 1].item() >= math.exp(sum(row)) - 1e-5


def test_a_masked_token_neither_enters_nor_resets_the_prefix_minimum() -> None:
    tokens = from_logs([[-5.0, 0.2, -9.0, -0.1, 0.3]], mask=[[0, 1, 0, 1, 1]])

    assert prefix_minimum(tokens)[0].tolist() == pytest.approx([0.0, 0.0, 0.2, 0.2, -0.1], abs=1e-6)


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


# ---- gates


def test_gates_are_monotone_in_their_threshold_and_see_trained_tokens_only() -> None:
    tokens = from_logs([[0.1, 2.0, -0.4], [0.0, 0.1, 0.2]], mask=[[1, 0, 1], [1, 1, 1]])
    advantage = torch.ones(2, 1)

    kept = [sequence_maximum(k2, threshold=t)(tokens, advantage)[:, 0].tolist() for t in (0.01, 0.03, 0.1)]

    assert kept == [[False, False], [False, True], [True, True]]


def test_a_sequence_on_the_threshold_is_kept() -> None:
    tokens = from_logs([[0.0, 0.0]])
    largest = torch.ones(1, 1)

    assert sequence_maximum(k2, threshold=0.0)(tokens, largest).item()
    assert sequence_mean(k3, threshold=0.0)(tokens, largest).item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_open"),
    [
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.7, -1.0, False),
        (0.7, 1.0, True),
        (1.3, 0.0, True),
        (0.7, 0.0, True),
        (1.1, 1.0, True),
    ],
)
def test_inside_clip_closes_what_moved_too_far_in_its_own_direction(
    ratio: float, advantage: float, is_open: bool
) -> None:
    tokens = from_logs([[math.log(ratio)]])

    assert inside_clip(token_ratio, low=0.2, high=0.2)(tokens, torch.tensor([[advantage]])).item() is is_open


def test_a_second_moment_at_the_threshold_is_not_below_it() -> None:
    tokens = replace(
        from_logs([[0.0, 0.0, 0.0]]),
        logprobs=torch.tensor([[0.5, -0.5, 0.25]]),
        behavior_logprobs=torch.zeros(1, 3),
    )

    # squares 1/4, 1/4, 1/16: all three have the mean 3/16, and the two smallest 5/32
    for threshold, kept in ((0.25, 3), (3 / 16, 2), (5 / 32, 1), (1 / 16, 0)):
        assert bounded_second_moment(threshold=threshold)(tokens, torch.ones(1, 1)).sum().item() == kept
    alone = replace(tokens, mask=torch.tensor([[True, False, False]]))
    assert not bounded_second_moment(threshold=0.25)(alone, torch.ones(1, 1)).any()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_token_on_the_edge_of_a_clip_or_band_is_inside(advantage: float) -> None:
    tokens = from_logs([[0.0]])

    for gate in (inside_clip(token_ratio, low=0.0, high=0.0), inside_band(token_ratio, low=1.0, high=1.0)):
        assert gate(tokens, torch.tensor([[advantage]])).item()


@pytest.mark.parametrize(
    ("kl", "gate"), [("exact", "trust_region_max"), ("lower_bound", "trust_region_max_lower_bound")]
)
def test_a_gate_is_named_after_what_its_kl_proves(kl: str, gate: str) -> None:
    objective = build_objective("trm", {"max_k2": "inf", "max_kl": 0.06, "kl": kl})

    assert objective(tokens_of(), {}).gates.keys() == {gate}


def test_a_clip_reports_the_tokens_without_gradient() -> None:
    tokens = tokens_of()

    loss = build_objective("dapo", {})(tokens, {})

    has_gradient = gradient(loss.total, tokens.logprobs) != 0
    assert torch.equal(has_gradient, loss.gates["clip"] & tokens.mask & (group_mean(tokens) != 0))


@pytest.mark.parametrize("options", [{"max_k2": 1e-9}, {"max_k2": 0.05}, {"max_k2": 1e9}])
def test_a_closed_gate_leaves_the_denominator_of_the_open_tokens(options: dict[str, object]) -> None:
    tokens = tokens_of()

    for name in ("trm", "stalewise"):
        loss = build_objective(name, options)(tokens, {"variance": 0.0, "variance_ema": 0.0})
        free = build_objective(name, {"max_k2": 1e9})(tokens, {"variance": 0.0, "variance_ema": 0.0})
        found, ungated = gradient(loss.total, tokens.logprobs), gradient(free.total, tokens.logprobs)
        is_open = loss.gates["trust_region_max_estimate"]
        torch.testing.assert_close(found, torch.where(is_open, ungated, 0.0), rtol=1e-6, atol=1e-9)


# ---- aggregation


def test_the_name_of_a_reduction_is_its_denominator() -> None:
    tokens = from_logs([[0.0] * 3, [0.0] * 2, [0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan], [6.0, math.nan, math.nan]])
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
    values = torch.tensor([[-3.0, math.nan, -1.0], [math.nan, math.nan, math.nan]])

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
