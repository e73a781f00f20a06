"""Dual ascent: direction, bounds, average, and what the learner must checkpoint."""

from dataclasses import replace

import pytest
import torch

from learner.objectives.recipes import RECIPES, build_objective
from tests.learner.objectives.batches import ROWS, tokens_of

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

    assert moved["variance_ema"] == pytest.approx(0.06)
    assert moved["variance"] == pytest.approx(0.05 - 0.01 * 0.02)


def test_a_batch_without_advantages_moves_nothing() -> None:
    objective = build_objective("r2vpo", OPTIONS)
    equal = tokens_of(tuple(replace(row, reward=0.5) for row in ROWS[:3]))

    assert objective.next_multipliers(equal, {"variance": 0.1, "variance_ema": 0.3}) == {
        "variance": 0.1,
        "variance_ema": 0.3,
    }


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_state_keeps_its_keys_and_the_step_is_pure(name: str) -> None:
    objective, tokens = build_objective(name, {}), tokens_of()
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
