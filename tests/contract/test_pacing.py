"""Who may move when, and that there is always somebody who may."""

import itertools
from collections.abc import Iterator

import pytest

from buffer.errors import InvalidRequest, InvalidSettings
from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Fresh, Mix, Selector, Uniform
from buffer.table import TableSettings
from buffer.types import InsertOutcome
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert, size_bytes
from tests.factories import make_group


def test_no_draw_before_min_size_and_no_insert_far_ahead_of_the_learner(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(samples_per_insert=2, min_size=3, error_buffer=4))

    before = [len(draw(table, 1)) for name in "abc" if insert(table, make_group(name))]
    outcomes = insert(table, *map(make_group, "efghij"))

    assert before == [0, 0, 1]  # one draw went through: inserts may be (3 x 2 + 4 + 1) / 2 = 5.5 groups
    assert outcomes == ["accepted", "accepted", "full", "full", "full", "full"]
    assert table.stats().limiter_error == 5 * 2 - 1


def test_no_draw_far_ahead_of_the_actors(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(samples_per_insert=2, min_size=3, error_buffer=4))
    insert(table, *map(make_group, "abc"))

    draws = [len(draw(table, 2)) for _ in range(4)]
    insert(table, make_group("d"))
    draws.append(len(draw(table, 2)))

    assert draws == [2, 2, 0, 0, 2]  # (3 - 3) x 2 - sampled >= -4, then one insert pays two samples


def test_refusal_says_the_numbers(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(samples_per_insert=1.5, min_size=1, error_buffer=3))

    results = table.insert([make_group(name) for name in "abcd"])

    assert results[-1].outcome is InsertOutcome.FULL
    assert results[-1].reason.startswith("inserts are 4.5 draws ahead of the learner and the limiter allows 4.5;")


def test_waits_name_who_waits_since_when_and_end_with_the_next_success(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(limiter=RateLimiterSettings(samples_per_insert=1, min_size=1, error_buffer=2))

    draw(table, 1)
    clock.advance(5)
    draw(table, 1)
    learner = table.stats().waits
    insert(table, *map(make_group, "abcd"))
    clock.advance(3)
    actors = table.stats().waits
    draw(table, 1)

    assert [(w.who, w.since_s) for w in learner] == [("learner", 5.0)]
    assert "fewer groups are stored than limiter.min_size" in learner[0].reason
    assert [(w.who, w.since_s) for w in actors] == [("actors", 3.0)]
    assert "ahead of samples_per_insert" in actors[0].reason
    assert table.stats().waits == []


def test_a_side_that_stopped_asking_does_not_wait(make_table: TableFactory, clock: Clock) -> None:
    table = make_table()
    draw(table, 1)

    clock.advance(31)
    stopped = table.stats().waits
    draw(table, 1)

    assert stopped == []
    assert [w.since_s for w in table.stats().waits] == [0.0]


def test_full_table_of_unsampled_groups_lets_the_learner_go_on(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=0.5, min_size=2, error_buffer=2)
    table = make_table(TableSettings(capacity_groups=2, reuse_limit=1), limiter)
    drawn, outcomes = [], []
    for i in range(12):
        outcomes += insert(table, make_group(f"g{i}"))
        drawn += ids(draw(table, 1))

    assert outcomes.count("accepted") >= 6
    assert len(drawn) >= 5
    assert len(set(drawn)) == len(drawn)


def test_pacing_is_back_as_soon_as_a_group_finds_room(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(min_size=3, error_buffer=8)
    table = make_table(TableSettings(capacity_bytes=3 * size_bytes("a")), limiter)

    outcomes = insert(table, make_group("a"), make_group("L", rewards=(0.0,) * 6), make_group("b"))

    assert outcomes == ["accepted", "full", "accepted"]
    assert draw(table, 1) == []


@pytest.mark.parametrize("make_table", ["memory", "redis", "http"], indirect=True)  # of shards all must be full
def test_a_draw_that_a_full_table_can_never_serve_is_refused_with_the_cure(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(min_size=4, error_buffer=8)
    table = make_table(TableSettings(capacity_bytes=3 * size_bytes("a")), limiter)

    assert insert(table, *map(make_group, "abcd")) == ["accepted"] * 3 + ["full"]

    with pytest.raises(InvalidRequest, match=r"holds 3 \(3 fresh, 3 that.*raise table.capacity_bytes"):
        draw(table, 4)
    assert ids(draw(table, 2)) == ["a", "b"]
    assert insert(table, make_group("d")) == ["accepted"]


def test_learner_short_of_fresh_groups_lets_the_actors_go_on(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=2, min_size=4, error_buffer=4)
    table = make_table(TableSettings(max_age_updates=0), limiter)
    half_fresh = Mix(fresh=0.5)
    for version in range(4):  # each group is used once and then too old: inserts get ever further ahead
        table.advance_version(version)
        insert(table, *[make_group(f"g{version}-{i}", version=version) for i in range(4)])
        assert len(draw(table, 4, half_fresh, learner_version=version)) == 4
    ahead = insert(table, make_group("n0", version=3))

    starved = draw(table, 4, half_fresh, learner_version=3)
    outcomes = insert(table, *[make_group(f"n{i}", version=3) for i in range(3)])

    assert (ahead, starved) == (["full"], [])
    assert outcomes == ["accepted", "accepted", "full"]
    assert {"n0", "n1"} <= set(ids(draw(table, 4, half_fresh, learner_version=3)))


def test_age_gate_that_removes_everything_unsampled_does_not_block_the_actors(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=2, min_size=3, error_buffer=4)
    table = make_table(TableSettings(max_age_updates=1, reuse_limit=2), limiter)
    insert(table, *map(make_group, "abcde"))

    table.advance_version(5)
    outcomes = insert(table, *[make_group(name, version=5) for name in "fghij"])

    assert table.stats().removed == {"age_unsampled": 5}
    assert outcomes == ["accepted"] * 5
    assert len(draw(table, 2, learner_version=5)) == 2
    assert table.stats().limiter_error == 5 * 2 - 2


@pytest.mark.parametrize(("spi", "num_groups"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 8)])
def test_reuse_limit_equal_to_samples_per_insert_never_stalls(
    make_table: TableFactory, spi: int, num_groups: int
) -> None:
    limiter = RateLimiterSettings(
        samples_per_insert=spi, min_size=num_groups, error_buffer=max(2 * spi, (num_groups + spi) / 2)
    )
    table = make_table(TableSettings(reuse_limit=spi, capacity_groups=2 * num_groups), limiter)
    sampled = 0
    for i in range(40):
        moved = insert(table, make_group(f"g{i}-{sampled}")) == ["accepted"]
        samples = draw(table, num_groups)
        sampled += len(samples)

        assert moved or samples, "both sides are blocked"

    assert table.stats().removed.get("reuse", 0) > 0


@pytest.mark.parametrize(
    ("settings", "limiter", "message"),
    [
        (
            TableSettings(capacity_groups=3),
            RateLimiterSettings(min_size=4),
            "min_size=4 is above table.capacity_groups=3",
        ),
        (TableSettings(reuse_limit=1), RateLimiterSettings(samples_per_insert=1.5), "reuse_limit=1 is below"),
    ],
    ids=["min_size", "reuse_limit"],
)
def test_settings_that_block_each_other_are_refused(
    make_table: TableFactory, settings: TableSettings, limiter: RateLimiterSettings, message: str
) -> None:
    with pytest.raises(InvalidSettings, match=message):
        make_table(settings, limiter)


def test_fresh_draws_at_one_sample_per_insert_flow_for_ever(make_table: TableFactory) -> None:
    table = make_table(
        TableSettings(capacity_groups=4), RateLimiterSettings(samples_per_insert=1, min_size=4, error_buffer=4)
    )
    drawn: list[str] = []
    for i in range(40):
        insert(table, make_group(f"g{i}"))
        drawn += ids(draw(table, 2, Fresh()))

    assert len(drawn) >= 30
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "settings", [TableSettings(capacity_groups=8), TableSettings(reuse_limit=3)], ids=["capacity", "reuse_limit"]
)
def test_one_fresh_draw_and_two_replayed_ones_at_three_samples_per_insert_flow_for_ever(
    make_table: TableFactory, settings: TableSettings
) -> None:
    limiter = RateLimiterSettings(samples_per_insert=3, min_size=4, error_buffer=6)
    table = make_table(settings, limiter)
    selectors: Iterator[Selector] = itertools.cycle([Fresh(), Uniform(), Uniform()])
    waiting, num_draws, num_inserted = next(selectors), 0, 0
    while num_draws < 60:
        moved = insert(table, make_group(f"g{num_inserted}")) == ["accepted"]
        num_inserted += moved
        samples = draw(table, 2, waiting)
        assert moved or samples, "both sides are blocked"
        if samples:
            assert isinstance(waiting, Uniform) or {sample.info.times_sampled for sample in samples} == {1}
            waiting, num_draws = next(selectors), num_draws + 1

    assert abs(table.stats().limiter_error - 4 * 3) <= 6 + 2 * 3  # one fresh draw may bring its groups beyond the slack


def test_fresh_draws_beyond_the_pace_are_served_as_groups_come_in(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(samples_per_insert=4, min_size=2, error_buffer=8))

    drawn: list[str] = []
    for i in range(40):
        insert(table, make_group(f"g{i}"))  # refused as too far ahead, until a draw has said what it lacks
        drawn += ids(draw(table, 2, Fresh()))

    assert len(set(drawn)) == len(drawn) > 20


def test_a_table_can_be_a_queue_that_blocks_at_both_ends(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1, min_size=1, error_buffer=2)
    table = make_table(TableSettings(reuse_limit=1), limiter)

    blocked = insert(table, *map(make_group, "abcd"))
    taken = [ids(draw(table, 1)) for _ in range(2)]
    unblocked = insert(table, make_group("d"))
    taken += [ids(draw(table, 1)) for _ in range(3)]

    assert blocked == ["accepted", "accepted", "accepted", "full"]
    assert unblocked == ["accepted"]
    assert taken == [["a"], ["b"], ["c"], ["d"], []]
    assert table.stats().num_groups == 0


def test_removals_below_min_size_close_the_draws_until_an_insert_opens_them(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1, min_size=3, error_buffer=5)
    table = make_table(TableSettings(reuse_limit=2), limiter)
    insert(table, *map(make_group, "abc"))

    drawn = [ids(draw(table, 1)) for _ in range(3)]  # a leaves after its second use
    insert(table, make_group("d"))
    drawn.append(ids(draw(table, 1)))

    assert drawn == [["a"], ["a"], [], ["b"]]


def test_removals_below_min_size_open_the_inserts_however_far_they_are_ahead(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=5, min_size=2, error_buffer=10)
    table = make_table(TableSettings(max_age_updates=0), limiter)
    insert(table, *map(make_group, "abcd"))
    for _ in range(2):
        draw(table, 2)

    ahead = insert(table, make_group("e"))
    table.advance_version(1)  # removes c and d as never used, a and b as used: those stay counted

    assert ahead == ["full"]
    assert table.stats().removed == {"age": 2, "age_unsampled": 2}
    assert insert(table, make_group("f", version=1)) == ["accepted"]
