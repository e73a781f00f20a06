"""The history of a run, in memory and in Redis: bounded, back to the start, the same for every worker."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buffer.redis_client import connect
from buffer.wire import Heartbeat, LearnerReport, Load
from services.history import TICK_S, History, MemoryHistory, Observation, RedisHistory, observe
from services.stats import service_stats
from tests.conftest import Clock
from tests.factories import make_group
from tests.services.live import make_context

MakeHistory = Callable[[int], History]


@pytest.fixture(params=["memory", "redis"])
def make_history(request: pytest.FixtureRequest, clock: Clock) -> Iterator[MakeHistory]:
    """Return a history of so many points on the clock; a second one of the same run is another worker's."""
    if request.param == "memory":
        histories: dict[int, History] = {}
        yield lambda capacity: histories.setdefault(capacity, MemoryHistory(clock, capacity))
        return
    with connect(request.getfixturevalue("redis_url")) as client:
        client.flushdb()
        yield lambda capacity: RedisHistory(client, prefix="history:", clock=clock, capacity=capacity)
        client.flushdb()


def at(number: int) -> Observation:
    gauges = {"reward/mean": float(number)} | ({"eval/accuracy": 0.25} if number == 1 else {})
    return Observation(counters={"updates": number}, gauges=gauges)


def test_points_join_in_pairs_when_there_are_too_many(make_history: MakeHistory, clock: Clock) -> None:
    start_s = clock()
    history = make_history(4)
    for number in range(7):  # the fifth joins the first four to two; a point then covers two ticks
        history.remember(at(number))
        clock.advance(TICK_S)

    page = history.read(after_s=0)
    assert page.step_s == 2 * TICK_S
    assert [point.at_s - start_s for point in page.points] == [0, 2 * TICK_S, 4 * TICK_S, 6 * TICK_S]
    assert [point.counters["updates"] for point in page.points] == [1, 3, 5, 6]
    assert [point.gauges["reward/mean"] for point in page.points] == [0.5, 2.5, 4.5, 6]
    assert [point.gauges.get("eval/accuracy") for point in page.points] == [0.25, None, None, None]


def test_only_points_asked_for_are_read(make_history: MakeHistory, clock: Clock) -> None:
    history = make_history(100)
    assert history.read(after_s=0).points == []
    for number in range(40):
        history.remember(at(number))
        clock.advance(TICK_S)

    def updates(ticks: int) -> list[float]:
        page = make_history(100).read(after_s=clock() - ticks * TICK_S)
        return [point.counters["updates"] for point in page.points]

    assert updates(2) == [38, 39]
    assert updates(30) == list(range(10, 40))
    assert updates(1_000) == list(range(40))


def test_workers_that_observe_at_the_same_time_count_once(make_history: MakeHistory, clock: Clock) -> None:
    first, second = make_history(100), make_history(100)

    first.remember(at(1))
    second.remember(at(2))
    clock.advance(TICK_S)
    second.remember(at(3))

    assert [point.counters["updates"] for point in first.read(after_s=0).points] == [1, 3]


def test_observation_holds_the_numbers_of_table_learner_and_actors(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    context.table.advance_version(0)
    context.table.insert([make_group("a"), make_group("b")])
    metrics = {"reward/mean": 0.5, "batch/groups": 2.0, "gate/clip_sequences_kept_share": 0.75}
    context.presence.report(LearnerReport(updates=7, version=7, metrics=metrics))
    loads = (Load(version=0, publish_to_loaded_s=9.0), Load(version=1, publish_to_loaded_s=0.5))
    beat = Heartbeat(version=1, tokens_per_s=2.0, groups_total=1, state="generating", loads=loads)
    context.presence.heartbeat("a", beat)

    seen = observe(service_stats(context))

    assert {"inserted": 2, "updates": 7, "outcome/accepted": 2}.items() <= seen.counters.items()
    expected = {"groups": 2, "tokens_per_s": 2.0, "publish_to_loaded_s": 0.5, "reward/mean": 0.5}
    assert (expected | {"gate/clip_sequences_kept_share": 0.75}).items() <= seen.gauges.items()
    assert "batch/groups" not in seen.gauges
