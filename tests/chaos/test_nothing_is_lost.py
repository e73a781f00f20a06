"""Every `accepted` is kept through kill -9 of anything: exactly once, whole, and counted."""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from buffer.client import HttpTable
from buffer.codec import encode_group
from buffer.connection import ServiceClient
from buffer.errors import NotFound
from buffer.table import TableStats
from buffer.types import Group
from tests.chaos.clients import DRAWS_PER_VERSION, GROUPS_PER_DRAW, Service, expected_group, journal_of
from tests.chaos.ruin import SAMPLER, WRITERS, Ruin
from tests.factories import content_hash

log = logging.getLogger(__name__)

EVERYSEC_LOSS_S = 2.0
"""Redis documents it: the write to the file waits for a running fsync for at most 2 s."""


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.config.getoption("chaos_seed"))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("chaos_kills")
    return number


@pytest.fixture
def ruin(tmp_path: Path, appendfsync: str, kills: int) -> Iterator[Ruin]:
    """Two workers in the long runs; in the short ones their starts would be most of the time."""
    with closing(Ruin(tmp_path, appendfsync, workers=2 if kills > 10 else 1)) as ruin:
        yield ruin


@pytest.mark.parametrize("appendfsync", ["always"])
def test_under_always_all_that_was_accepted_is_there_once_and_whole(ruin: Ruin, kills: int, rng: random.Random) -> None:
    ruin.endure(kills, rng)
    ruin.settle()

    answers, draws = answers_of(ruin), draws_of(ruin)
    told = {answer["group_id"] for answer in answers}
    stored, stats = stored_groups(ruin, told), stats_of(ruin.service)
    log.info("%d kills: %d groups accepted, %d draws, none lost", kills, len(told), len(draws))

    assert {answer["outcome"] for answer in answers} <= {"accepted", "duplicate"}
    assert set(stored) == told
    assert_counters_describe(stats, stored)
    uses = Counter(group_id for draw in draws for group_id in draw)
    assert stats.stored_uses == Counter(uses[group_id] for group_id in told)
    assert stats.sampled_total == GROUPS_PER_DRAW * len(draws)
    assert stats.latest_version == (len(draws) - 1) // DRAWS_PER_VERSION


@pytest.mark.parametrize("appendfsync", ["everysec"])
def test_under_everysec_only_the_last_two_seconds_before_a_kill_of_redis_can_be_lost(
    ruin: Ruin, kills: int, rng: random.Random
) -> None:
    ruin.endure(kills, rng)
    ruin.settle()

    answers = {answer["group_id"]: answer for answer in answers_of(ruin)}
    stored, stats = stored_groups(ruin, set(answers)), stats_of(ruin.service)
    lost = [answer for group_id, answer in answers.items() if group_id not in stored]
    log.info("%d kills: %d groups accepted, %d lost", kills, len(answers), len(lost))

    assert {answer["outcome"] for answer in answers.values()} <= {"accepted", "duplicate"}
    assert [answer for answer in lost if not excused(answer, ruin.redis_kills)] == []
    assert_counters_describe(stats, stored)


def excused(answer: dict[str, Any], redis_kills: list[tuple[float, float]]) -> bool:
    """Return whether a group can have been accepted within 2 s before some kill of Redis."""
    return any(
        answer["sent_s"] <= gone_s and answer["told_s"] >= before_s - EVERYSEC_LOSS_S
        for before_s, gone_s in redis_kills
    )


def assert_counters_describe(stats: TableStats, stored: dict[str, Group]) -> None:
    """Assert that the counters add up to what is stored: none twice, none half, none besides."""
    groups = stored.values()
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert stats.num_groups == stats.inserted_total == stats.outcomes["accepted"] == len(stored)
    assert stats.num_trajectories_total == len(trajectories)
    assert stats.reward_sum == sum(trajectory.reward for trajectory in trajectories)
    assert stats.num_response_tokens == sum(group.num_response_tokens for group in groups)
    assert stats.bytes == sum(len(encode_group(group)) for group in groups)
    assert stats.stored_versions == {0: len(stored)}
    assert sum(stats.stored_uses.values()) == len(stored)
    assert sum(times * number for times, number in stats.stored_uses.items()) == stats.sampled_total
    assert stats.num_fresh == stats.stored_uses.get(0, 0)
    assert stats.limiter_error == stats.inserted_total - stats.sampled_total
    assert stats.removed == {}


def answers_of(ruin: Ruin) -> list[dict[str, Any]]:
    """Return what the writers were told, group by group."""
    return [answer for name in WRITERS for answer in journal_of(ruin.directory, name).entries()]


def draws_of(ruin: Ruin) -> list[dict[str, str]]:
    """Return group id -> content hash of each draw that the sampler was given, all of them as they were inserted."""
    draws: list[dict[str, str]] = [entry["hashes"] for entry in journal_of(ruin.directory, SAMPLER).entries()]
    for draw in draws:
        assert draw == {group_id: content_hash(expected_group(group_id)) for group_id in draw}
        assert len(draw) == GROUPS_PER_DRAW
    return draws


def stored_groups(ruin: Ruin, group_ids: set[str]) -> dict[str, Group]:
    """Read the groups back, and check each against what its writer sent."""
    stored: dict[str, Group] = {}
    for group_id in group_ids:
        try:
            group = ruin.service.call(partial(get_group, group_id))
        except NotFound:
            continue
        assert content_hash(group) == content_hash(expected_group(group_id)), group_id
        stored[group_id] = group
    return stored


def get_group(group_id: str, client: ServiceClient) -> Group:
    return HttpTable(client).get(group_id)


def stats_of(service: Service) -> TableStats:
    """Return the counters."""
    return service.call(lambda client: HttpTable(client).stats())
