import pytest
import torch

from buffer.types import VersionSpan
from learner.collate import NO_AGE, collate
from learner.metrics import batch_metrics
from tests.factories import make_group, make_trajectory
from tests.learner.builders import as_sample, mixed_samples


def test_prompt_and_response_are_joined_and_padded_on_the_right() -> None:
    batch = collate(mixed_samples(), clock=2)

    assert batch.token_ids[1].tolist() == [5, 6, 7, 8, 9, 2, 0, 0]
    assert batch.prompt_lengths.tolist() == [1, 4, 2, 2, 3]
    assert batch.sequence_lengths.tolist() == [8, 6, 7, 5, 7]
    assert batch.mask[2].tolist() == [False, True, False, False, True, False, False]
    assert batch.behavior_logprobs[1].tolist() == [-0.125, -0.25, 0, 0, 0, 0, 0]


def test_every_trajectory_of_every_group_is_in_the_batch() -> None:
    batch = collate(mixed_samples(), clock=2)

    assert batch.keys == (("a", "plain"), ("a", "warm"), ("a", "tool"), ("b", "top"), ("b", "b1"))
    assert batch.group.tolist() == [0, 0, 0, 1, 1]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5, 0.25, -1.0]


def test_age_follows_the_span_of_each_token_and_is_none_where_masked_or_foreign() -> None:
    spans = (
        VersionSpan(start=0, end=2, version=3),
        VersionSpan(start=2, end=4, version=5),
        VersionSpan(start=4, end=5, version=None),
    )
    trajectory = make_trajectory(
        response_ids=[8, 9, 10, 11, 12], response_mask=[True, True, False, True, True], spans=spans
    )

    batch = collate([as_sample(make_group(trajectories=[trajectory]))], clock=9)

    assert batch.age_updates.tolist() == [[6, 6, NO_AGE, 4, NO_AGE]]


def test_members_of_an_episode_share_a_number_within_their_group_alone() -> None:
    members = [make_trajectory("x", episode_id="e"), make_trajectory("y"), make_trajectory("z", episode_id="e")]
    samples = [as_sample(make_group(name, trajectories=members)) for name in ("a", "b")]

    assert collate(samples, clock=0).episode.tolist() == [0, 1, 0, 2, 3, 2]


def test_an_episode_named_like_a_trajectory_is_not_that_trajectory() -> None:
    members = [make_trajectory("x"), make_trajectory("y", episode_id="x")]

    assert collate([as_sample(make_group(trajectories=members))], clock=0).episode.tolist() == [0, 1]


def test_token_rewards_are_zero_for_trajectories_without_and_absent_when_nobody_has_them() -> None:
    bare = make_trajectory("bare", response_ids=[8, 2])
    rewarded = make_trajectory("rewarded", response_ids=[8, 2], token_rewards=[0.5, -1.0])

    batch = collate([as_sample(make_group(trajectories=[bare, rewarded]))], clock=0)

    assert batch.token_rewards is not None
    assert batch.token_rewards.tolist() == [[0.0, 0.0], [0.5, -1.0]]
    assert collate([as_sample(make_group(trajectories=[bare]))], clock=0).token_rewards is None


def test_a_group_drawn_twice_for_one_batch_is_refused() -> None:
    with pytest.raises(AssertionError, match="drawn twice"):
        collate([as_sample(make_group("a")), as_sample(make_group("a"))], clock=0)


def test_age_metrics_are_over_groups_by_their_oldest_token() -> None:
    samples = [as_sample(make_group(f"g{version}", version=version)) for version in (10, 8, 4)]
    samples.append(as_sample(make_group("foreign", version=None), times_sampled=5, age_updates=None))

    metrics = batch_metrics(collate(samples, clock=12))

    assert metrics["age/updates_p50"] == 4
    assert metrics["age/updates_max"] == 8
    assert metrics["age/foreign_share"] == 0.25
    assert metrics["reuse/times_mean"] == 2


def test_reward_metrics_tell_groups_without_signal() -> None:
    samples = [as_sample(make_group("a", rewards=(1.0, 0.0))), as_sample(make_group("b", rewards=(0.0, 0.0)))]

    metrics = batch_metrics(collate(samples, clock=0))

    assert metrics["reward/mean"] == 0.25
    assert metrics["reward/group_best_mean"] == 0.5
    assert metrics["reward/group_equal_share"] == 0.5
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()
