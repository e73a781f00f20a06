"""Dual ascent: direction, bounds, average, and what the learner must checkpoint."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import Tokens
from tests.learner.objectives.batches import ROWS, tokens_of, whole

OPTIONS = {"lambda_start": 0.05, "lambda_max": 0.2, "dual_step": 0.01}


def test_multiplier_rises_above_the_target_variance_and_falls_below_it() -> None:
    objective = build_objective("r2vpo", {**OPTIONS, "target_variance": 0.04})
    start = objective.initial_multipliers()

    wild = objective.next_multipliers(tokens_of(), start)
    calm = objective.next_multipliers(tokens_of(on_policy=True), start)

    assert start == {"variance": 0.05, "variance_ema": 0.04}
    assert wild["variance"] > 0.05
    assert calm["variance"] == pytest.approx(0.05 - 0.01 * 0.04)
    assert calm["variance_ema"] == 0.0


def test_multiplier_stays_within_its_bounds_and_says_so() -> None:
    objective = build_objective("r2vpo", {**OPTIONS, "dual_step": 1e3})
    start = objective.initial_multipliers()

    top = objective.next_multipliers(tokens_of(), start)
    bottom = objective.next_multipliers(tokens_of(on_policy=True), start)

    assert top["variance"] == 0.2
    assert bottom["variance"] == 0.0
    assert objective(tokens_of(), top).watched["variance_saturated"].item() == 1.0
    assert objective(tokens_of(), bottom).watched["variance_saturated"].item() == 0.0


def test_the_average_decays() -> None:
    objective = build_objective("r2vpo", {**OPTIONS, "dual_decay": 0.75, "target_variance": 0.08})

    moved = objective.next_multipliers(tokens_of(on_policy=True), objective.initial_multipliers())
    wild = objective.next_multipliers(tokens_of(), objective.initial_multipliers())

    assert moved["variance_ema"] == pytest.approx(0.06)
    assert moved["variance"] == pytest.approx(0.05 - 0.01 * 0.02)
    now = statistics.fmean((math.exp(row.log_ratios[t]) - 1) ** 2 for row in ROWS for t in row.trained)
    assert wild["variance_ema"] == pytest.approx(0.75 * 0.08 + 0.25 * now, rel=1e-5)


def test_a_batch_without_advantages_moves_nothing() -> None:
    objective = build_objective("r2vpo", OPTIONS)
    equal = tokens_of(tuple(replace(row, reward=0.5) for row in ROWS[:3]))

    assert objective.next_multipliers(equal, {"variance": 0.1, "variance_ema": 0.3}) == {
        "variance": 0.1,
        "variance_ema": 0.3,
    }


def only_tokens_of_age(ages: range) -> Tokens:
    """The common batch, its other tokens at pi = behaviour."""
    rows = [
        replace(row, log_ratios=[log if a in ages else 0.0 for log, a in zip(row.log_ratios, row.ages, strict=True)])
        for row in ROWS
    ]
    return tokens_of(tuple(rows))


@pytest.mark.parametrize(("fresh_updates", "drifting"), [(0, 5), (1, 8), (2, 9), (3, 11), (100, 22)])
def test_fresh_tokens_are_those_up_to_an_age_and_drive_their_own_multiplier(fresh_updates: int, drifting: int) -> None:
    options = {**OPTIONS, "dual_step": 1.0, "fresh_updates": fresh_updates, "target_variance": 1e-9}
    start = {"variance": 0.1, "variance_ema": 0.0}
    logs = [
        row.log_ratios[t] for row in ROWS for t in row.trained if 0 <= row.ages[t] <= fresh_updates
    ]  # foreign tokens have age -1 and are never fresh
    variance = statistics.fmean((math.exp(log) - 1) ** 2 for log in logs)

    objective = build_objective("r2vpo_fresh", options)
    moved = objective.next_multipliers(tokens_of(), start)
    watched = objective(tokens_of(), start).watched
    elsewhere = objective.next_multipliers(only_tokens_of_age(range(fresh_updates + 1, 999)), start)

    assert len(logs) == drifting
    assert moved["variance_ema"] == pytest.approx(variance, rel=1e-5)
    assert watched["variance_fresh"].item() == pytest.approx(variance, rel=1e-5)
    assert elsewhere["variance_ema"] == 0.0


def test_both_buckets_are_reported_and_share_out_the_whole() -> None:
    watched = build_objective("r2vpo", OPTIONS)(tokens_of(), {"variance": 0.1, "variance_ema": 0.0}).watched
    moved = build_objective("r2vpo", OPTIONS).next_multipliers(tokens_of(), {"variance": 0.1, "variance_ema": 0.0})

    whole = (8 * watched["variance_fresh"] + 16 * watched["variance_stale"]) / 24
    assert whole.item() == pytest.approx(moved["variance_ema"], rel=1e-5)


def test_a_batch_without_fresh_tokens_moves_nothing_and_reports_no_fresh_variance() -> None:
    tokens, objective = tokens_of(ROWS[3:7]), build_objective("r2vpo_fresh", OPTIONS)
    state = {"variance": 0.1, "variance_ema": 0.3}

    loss = objective(tokens, state)

    assert objective.next_multipliers(tokens, state) == state
    metrics = diagnose(tokens, loss)
    assert whole("stalewise").next_multipliers(tokens, state) != state  # the whole batch drives it
    assert "watched/variance_fresh_mean" not in metrics
    assert metrics["watched/variance_stale_mean"] > 0


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_state_keeps_its_keys_and_the_step_is_pure(name: str) -> None:
    objective, tokens = whole(name), tokens_of()
    start = objective.initial_multipliers()
    before = dict(start)

    once, again = objective.next_multipliers(tokens, start), objective.next_multipliers(tokens, start)

    assert start == before
    assert once == again
    assert once.keys() == start.keys()


def test_the_multiplier_weighs_the_penalty() -> None:
    objective, tokens = build_objective("r2vpo", OPTIONS), tokens_of()

    single = objective(tokens, {"variance": 0.1, "variance_ema": 0.0}).parts["variance"]
    double = objective(tokens, {"variance": 0.2, "variance_ema": 0.0}).parts["variance"]

    torch.testing.assert_close(double, 2 * single)
