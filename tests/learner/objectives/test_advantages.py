"""Advantages: episodes count once, groups of one have no baseline."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learner.objectives.advantages import batch_normalised, group_mean, leave_one_out, no_baseline, standardised
from learner.tokens import Tokens
from tests.learner.objectives.batches import one_batch


def rewards(values: list[float], group: list[int], episode: list[int] | None = None) -> Tokens:
    tokens = one_batch(policy=[[0.5]] * len(values), behavior=[[0.5]] * len(values), rewards=values, group=group)
    return tokens if episode is None else replace(tokens, episode=torch.tensor(episode))


def flat(values: Tensor) -> list[float]:
    found: list[float] = values[:, 0].tolist()
    return found


def test_advantages_of_unequal_groups_and_a_group_of_one() -> None:
    tokens = rewards([1.0, 0.0, 0.0, 2.0, 4.0, 0.5], group=[0, 0, 0, 1, 1, 2])
    sample, population = standardised(lost_degrees=1, epsilon=1e-6), standardised(lost_degrees=0, epsilon=1e-6)

    assert flat(no_baseline(tokens)) == [1.0, 0.0, 0.0, 2.0, 4.0, 0.5]
    assert flat(group_mean(tokens)) == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1.0, 1.0, 0.5])
    assert flat(leave_one_out(tokens)) == pytest.approx([1.0, -0.5, -0.5, -2.0, 2.0, 0.5])
    assert flat(sample(tokens)) == pytest.approx([1.154701, -0.577350, -0.577350, -0.707107, 0.707107, 0.5], abs=3e-6)
    assert flat(population(tokens)) == pytest.approx([1.414214, -0.707107, -0.707107, -1.0, 1.0, 0.5], abs=5e-6)


def test_an_episode_counts_once_in_the_baseline() -> None:
    tokens = rewards([1.0, 1.0, 1.0, 0.0], group=[0, 0, 0, 0], episode=[0, 0, 0, 1])

    assert flat(group_mean(tokens)) == pytest.approx([0.5, 0.5, 0.5, -0.5])
    assert flat(leave_one_out(tokens)) == pytest.approx([1.0, 1.0, 1.0, -1.0])


def test_trajectories_of_one_episode_may_have_rewards_of_their_own() -> None:
    tokens = rewards([1.0, 0.0, 0.0], group=[0, 0, 0], episode=[0, 0, 1])

    assert flat(group_mean(tokens)) == pytest.approx([0.75, -0.25, -0.25])
    assert flat(leave_one_out(tokens)) == pytest.approx([1.0, 0.0, -0.5])  # the others': 0, 0 and (1 + 0) / 2


def test_a_group_of_one_episode_has_no_baseline_however_many_trajectories_it_has() -> None:
    tokens = rewards([0.5, 0.5], group=[0, 0], episode=[1, 1])

    for advantage in (group_mean, leave_one_out, standardised(lost_degrees=1, epsilon=1e-6)):
        assert flat(advantage(tokens)) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 0.0, 1.0], [0.7071, -1.4142, 0.7071]), ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]), ([0.5], [0.0])],
)
def test_groups_of_one_are_compared_over_the_batch(values: list[float], expected: list[float]) -> None:
    tokens = rewards(values, group=list(range(len(values))))

    assert flat(batch_normalised(tokens)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reward", [0.1, 0.7, -3.3, 1e4])
def test_equal_rewards_standardise_to_nothing(reward: float) -> None:
    tokens = rewards([reward] * 7, group=[0] * 7)

    assert max(map(abs, flat(standardised(lost_degrees=1, epsilon=1e-6)(tokens)))) < 1e-5


# ---- bellman
