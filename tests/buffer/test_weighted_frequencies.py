"""Draws of several groups keep the stated shares: without what is owed, they would be flattened visibly."""

import random
from collections import Counter

import pytest

from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import connect
from buffer.redis_table import RedisTable
from buffer.selectors import Weighted
from buffer.table import ReplayTable, SampleRequest, TableSettings
from buffer.weighting import PriorityWeighting
from tests.factories import RUN_ID, make_group

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0, "e": 5.0, "f": 8.0}
SETTINGS = TableSettings(weighting=PriorityWeighting(exponent=1.0))
LIMITER = RateLimiterSettings(min_size=2, error_buffer=1e9)


@pytest.fixture(params=["memory", "redis"])
def table(request: pytest.FixtureRequest) -> ReplayTable:
    rng = random.Random(11)
    if request.param == "memory":
        return MemoryTable(SETTINGS, LIMITER, RUN_ID, rng=rng)
    client = connect(request.getfixturevalue("redis_url"))
    client.flushdb()
    return RedisTable(client, SETTINGS, LIMITER, RUN_ID, rng=rng)


def test_pairs_are_drawn_as_often_as_their_share_says(table: ReplayTable) -> None:
    table.advance_version(0)
    table.insert([make_group(name) for name in WEIGHTS])
    table.update_priorities(WEIGHTS)

    times: Counter[str] = Counter()
    for i in range(1500):
        request = SampleRequest(num_groups=2, learner_version=0, request_id=f"r{i}", selector=Weighted(by="priority"))
        times.update(sample.group.group_id for sample in table.sample(request))

    expected = {name: 3000 * weight / 20 for name, weight in WEIGHTS.items()}
    # f has 0.8 of a place in each pair; fresh clocks for each pair would draw it 1036 times instead of 1200
    assert sum((times[name] - n) ** 2 / n for name, n in expected.items()) < 20.52  # chi-square, 5 degrees, 0.999
