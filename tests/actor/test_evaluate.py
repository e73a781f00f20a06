from itertools import combinations
from statistics import mean

import pytest

from actor.evaluate import pass_at_k, summary
from actor.settings import EvaluationSettings
from buffer.types import Split
from tests.factories import make_group


@pytest.mark.parametrize(("num_samples", "num_solved"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_samples_that_hold_a_solved_one(
    num_samples: int, num_solved: int
) -> None:
    samples = [index < num_solved for index in range(num_samples)]
    for k in range(1, num_samples + 1):
        assert pass_at_k(num_samples, num_solved, k) == pytest.approx(mean(map(any, combinations(samples, k))))


def test_pass_at_k_does_not_overflow() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_a_summary_is_over_prompts_and_says_which_versions_drew_it() -> None:
    groups = [
        make_group("a", split=Split.EVAL, version=3, rewards=(1.0, 0.0, 0.9, 0.0)),
        make_group("b", split=Split.EVAL, version=4, rewards=(0.0, 0.0, 0.0, 0.0)),
        make_group("c", split=Split.EVAL, version=4, rewards=(1.0, 1.0, 1.0, 0.9)),
    ]

    evaluation = summary(
        groups,
        actor_id="a",
        version=4,
        settings=EvaluationSettings(every_updates=1, samples_per_prompt=4),
        solved_reward=0.95,
        finished_s=1.0,
        seconds=2.0,
    )

    # solved of 4: 1, 0, 3
    assert evaluation.pass_at == pytest.approx({"1": 4 / 12, "2": (1 / 2 + 0 + 1) / 3, "4": 2 / 3})
    assert evaluation.pass_1_standard_error == pytest.approx(
        (((1 / 12) ** 2 + (4 / 12) ** 2 + (5 / 12) ** 2) / 9) ** 0.5
    )
    assert evaluation.reward_mean == pytest.approx((1.9 + 0 + 3.9) / 12)
    assert (evaluation.num_prompts, evaluation.samples_per_prompt) == (3, 4)
    assert (evaluation.oldest_version, evaluation.newest_version) == (3, 4)
