"""Every recipe equals a plain Python loop, in loss and in gradient, on ragged rows with nan behind the mask."""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from learner.objectives.objective import Objective
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import Column
from tests.learner.objectives import plain_loops, plain_loops_of_baselines
from tests.learner.objectives.batches import ROWS, Row, gradient, tokens_of, whole
from tests.learner.objectives.plain_loops import Result

LOOPS = {**plain_loops.LOOPS, **plain_loops_of_baselines.LOOPS}
MULTIPLIERS = {"variance": 0.04, "variance_ema": 0.04}


def assert_equal(objective: Objective, expected: Result, rows: tuple[Row, ...] = ROWS) -> None:
    tokens = tokens_of(rows)

    loss = objective(tokens, MULTIPLIERS)

    assert loss.total.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
    assert sum(part.item() for part in loss.parts.values()) == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
    for leaf, by_token in (
        (tokens.logprobs, expected.logprobs),
        (tokens.columns[Column.UNIT_LOGPROBS], expected.unit_logprobs),
    ):
        wanted = torch.zeros(leaf.shape)
        for (i, t), value in by_token.items():
            wanted[i, t] = value
        torch.testing.assert_close(gradient(loss.total, leaf), wanted, rtol=2e-5, atol=1e-7)
    first = torch.tensor([expected.first_logit.get(i, 0.0) for i in range(len(rows))])
    leaf = tokens.columns[Column.FIRST_LOGIT]
    torch.testing.assert_close(gradient(loss.total, leaf), first, rtol=2e-5, atol=1e-7)


def test_every_recipe_has_a_plain_loop() -> None:
    assert LOOPS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_recipe_equals_its_plain_loop_in_loss_and_gradient(name: str) -> None:
    assert_equal(whole(name), LOOPS[name](ROWS))


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_recipe_equals_its_plain_loop_on_one_token_and_on_one_group(name: str) -> None:
    for rows in (ROWS[4:5], ROWS[:3]):
        assert_equal(whole(name), LOOPS[name](rows), rows)


@pytest.mark.parametrize(
    ("name", "options", "loop"),
    [
        ("grpo", {"dual_clip": 3.0, "reference_kl": 0.04}, plain_loops.grpo_with_everything),
        ("trm", {"max_k2": 0.1, "mean_k3": 0.03}, lambda rows: plain_loops.trm(rows, 0.1, 0.03)),
        ("trm", {"max_k2": "inf", "mean_k3": 0.01}, lambda rows: plain_loops.trm(rows, 1e9, 0.01)),
        (
            "trm",
            {"max_k2": "inf", "max_kl": 0.12, "mean_kl": 0.05},
            lambda rows: plain_loops.trm_exact(rows, 0.12, 0.05),
        ),
        ("trm", {"max_k2": "inf", "max_kl": 0.12}, lambda rows: plain_loops.trm_exact(rows, 0.12, 1e9)),
        ("trm", {"max_k2": "inf", "mean_kl": 0.06}, lambda rows: plain_loops.trm_exact(rows, 1e9, 0.06)),
        (
            "trm",
            {"max_k2": "inf", "max_kl": 0.06, "kl": "lower_bound"},
            lambda rows: plain_loops.trm_exact(rows, 0.06, 1e9, share=0.6),
        ),
        (
            "trm_ln",
            {"weighted_deviation": 0.2, "epsilon": 0.4, "delta": 0.3},
            lambda rows: plain_loops.trm_ln(rows, 0.2, 0.4, 0.3),
        ),
        ("trm_ser", {"mean_deviation": 0.25}, lambda rows: plain_loops.trm_ser(rows, 0.25)),
        ("dr_grpo", {"length_tokens": 7}, lambda rows: plain_loops_of_baselines.dr_grpo(rows, 7.0)),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.28}, plain_loops_of_baselines.gspo_with_a_wide_clip),
        (
            "tis_ppo",
            {"cap": 1.1, "clip_low": 0.02, "clip_high": 0.03},
            plain_loops_of_baselines.tis_ppo_with_a_tight_clip,
        ),
        (
            "icepop",
            {"band_low": 0.8, "band_high": 1.2},
            lambda rows: plain_loops_of_baselines.icepop(rows, 0.8, 1.2),
        ),
        ("m2po", {"threshold": 0.4}, lambda rows: plain_loops_of_baselines.m2po(rows, 0.4)),
        (
            "minirl",
            {"cap": 1.2, "clip_low": 0.02, "clip_high": 0.03},
            lambda rows: plain_loops_of_baselines.minirl(rows, 1.2, 0.02, 0.03),
        ),
        (
            "topr",
            {"advantage": "group_mean"},
            lambda rows: plain_loops_of_baselines.topr(rows, plain_loops.group_mean),
        ),
        ("r2vpo", {"max_log_ratio": 0.5}, lambda rows: plain_loops.r2vpo(rows, 0.5)),
        (
            "minpro",
            {"clip_low": 0.2, "advantage": "leave_one_out"},
            lambda rows: plain_loops.weighted_score(
                rows,
                lambda row, t: plain_loops.clip(plain_loops.prefix_ratio(row, t), 0.8, 1.28),
                plain_loops.leave_one_out,
            ),
        ),
        (
            "reval",
            {"beta": 0.5, "centring": "none", "scale_by_beta": True},
            lambda rows: plain_loops.squared_residual(rows, 0.5, plain_loops.raw, 0.25 / len(rows)),
        ),
        ("stalewise", {}, plain_loops.stalewise_policy),
        (
            "stalewise",
            {"taper": False, "weight": "token", "max_k2": "inf", "advantage": "group_mean"},
            lambda rows: plain_loops.weighted_score(
                rows, lambda row, t: min(plain_loops.token_ratio(row, t), 1.28), plain_loops.group_mean
            ),
        ),
        (
            "stalewise",
            {"taper": False, "advantage": "leave_one_out"},
            lambda rows: plain_loops.weighted_score(
                rows,
                lambda row, t: plain_loops.clip(plain_loops.prefix_ratio(row, t), 0.0, 1.28),
                plain_loops.leave_one_out,
                lambda row: plain_loops.inside_trust_region(row, 0.5, math.inf),
            ),
        ),
        (
            "stalewise",
            {"lambda_max": 0, "policy_coefficient": 0, "beta": 0.5, "centring": "group_mean", "bellman_coefficient": 3},
            lambda rows: plain_loops.squared_residual(
                rows, 0.5, plain_loops.group_mean, 3 * 0.5 / (2 * plain_loops.num_tokens(rows))
            ),
        ),
        *(
            (
                "reinforce",
                {"advantage": option},
                lambda rows, advantage=advantage: plain_loops.weighted_score(rows, lambda row, t: 1.0, advantage),
            )
            for option, advantage in (
                ("none", plain_loops.raw),
                ("leave_one_out", plain_loops.leave_one_out),
                ("standardised", plain_loops.standardised),
                ("standardised_population", plain_loops.standardised_population),
                ("batch_normalised", plain_loops_of_baselines.batch_normalised),
            )
        ),
    ],
)
def test_options_do_what_their_loop_does(
    name: str, options: Mapping[str, object], loop: Callable[[Sequence[Row]], Result]
) -> None:
    assert_equal(build_objective(name, options), loop(ROWS))
