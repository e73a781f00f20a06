"""The last trained groups, in memory and in Redis: bounded, newest first, the same for every worker."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from buffer.errors import NotFound
from buffer.redis_client import connect
from buffer.trained import MAX_TRAINED_GROUPS
from services.trained_ring import MAX_BYTES, MemoryTrainedRing, RedisTrainedRing, TrainedRing
from tests.services.trained import make_trained

MakeRing = Callable[[], TrainedRing]


@pytest.fixture(params=["memory", "redis"])
def make_ring(request: pytest.FixtureRequest) -> Iterator[MakeRing]:
    """Return one more worker's view of the same ring."""
    if request.param == "memory":
        ring = MemoryTrainedRing()
        yield lambda: ring
        return
    with connect(request.getfixturevalue("redis_url")) as client:
        client.flushdb()
        yield lambda: RedisTrainedRing(client, prefix="trained:")
        client.flushdb()


def ids(ring: TrainedRing) -> list[str]:
    return [summary.group_id for summary in ring.summaries()]


def test_newest_groups_are_read_by_any_worker_and_one_trained_anew_moves_up(make_ring: MakeRing) -> None:
    make_ring().push([make_trained("a"), make_trained("b", version=5)])
    make_ring().push([make_trained("a", version=6, num_tokens=4)])

    ring = make_ring()
    assert ids(ring) == ["a", "b"]
    newest = ring.summaries()[0]
    assert (newest.version, newest.num_response_tokens, newest.mean_reward) == (6, 4, 1.0)
    assert newest.log_ratio_absolute_max == pytest.approx(np.log(2))
    assert ring.get("b").trajectories[0].log_ratios.tolist() == pytest.approx([0, 0, np.log(2)])
    with pytest.raises(NotFound, match="c is not among the last trained groups"):
        ring.get("c")


def test_oldest_groups_leave_beyond_the_number(make_ring: MakeRing) -> None:
    ring = make_ring()
    for start in (0, 200):
        ring.push([make_trained(f"g{number}") for number in range(start, start + 200)])

    assert ids(ring) == [f"g{number}" for number in range(399, 399 - MAX_TRAINED_GROUPS, -1)]
    with pytest.raises(NotFound):
        ring.get("g0")


def test_oldest_groups_leave_beyond_the_bytes(make_ring: MakeRing) -> None:
    ring = make_ring()
    third = MAX_BYTES // 3 // 13  # a token has 13 bytes, so three of them are just over the bound with their names
    for name in "abcd":
        ring.push([make_trained(name, num_tokens=third)])

    assert ids(ring) == ["d", "c"]
    ring.push([make_trained("small")])
    assert ids(ring) == ["small", "d", "c"]
