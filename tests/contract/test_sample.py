"""Which groups a draw hands out, what it says about them, and when it repeats itself."""

from collections import Counter

import pytest

from buffer.codec import encode_group
from buffer.errors import Conflict, InvalidRequest
from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Fifo, Fresh, Lifo, Mix, Selector, Uniform, Weighted
from buffer.table import TableSettings
from buffer.weighting import DifficultyWeighting, PriorityWeighting, RankWeighting, RecencyWeighting, Weighting
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert
from tests.factories import make_group, make_trajectory

BATCHES = RateLimiterSettings(samples_per_insert=1, min_size=4, error_buffer=1e9)


def test_fifo_hands_out_the_oldest_first_and_again_until_they_leave(make_table: TableFactory) -> None:
    table = make_table(TableSettings(reuse_limit=2), BATCHES)
    insert(table, *map(make_group, "abcdef"))

    draws = [draw(table, 2), draw(table, 2)]
    insert(table, *map(make_group, "gh"))
    draws.append(draw(table, 2))

    assert [ids(samples) for samples in draws] == [["a", "b"], ["a", "b"], ["c", "d"]]
    assert [samples[0].info.times_sampled for samples in draws] == [1, 2, 1]


def test_fresh_never_hands_out_a_group_twice(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcde"))

    draws = [draw(table, 3, Fresh()), draw(table, 3, Fresh()), draw(table, 2, Fresh())]

    assert [ids(samples) for samples in draws] == [["a", "b", "c"], [], ["d", "e"]]


def test_uniform_draws_distinct_groups_and_reaches_all_of_them_alike(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdef"))

    draws = [ids(draw(table, 4, Uniform())) for _ in range(300)]

    assert all(len(set(drawn)) == 4 for drawn in draws)
    times = Counter(group_id for drawn in draws for group_id in drawn)
    assert set(times) == set("abcdef")
    assert max(abs(n - 200) for n in times.values()) < 45  # 5.5 standard deviations of a binomial(300, 2/3)


def test_uniform_probability_is_one_over_the_sampleable_groups(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdefgh"))

    def stated(selector: Selector) -> list[tuple[float, int]]:
        return [(s.info.probability, s.info.num_candidates) for s in draw(table, 2, selector)]

    assert stated(Uniform()) == [(1 / 8, 8), (1 / 8, 8)]
    assert stated(Fifo()) == [(1.0, 1), (1.0, 1)]


@pytest.mark.parametrize(("selector", "order"), [(Fifo(), 1), (Lifo(), -1)], ids=["fifo", "lifo"])
def test_order_of_insertion_holds_over_the_gaps_of_groups_that_left(
    make_table: TableFactory, selector: Selector, order: int
) -> None:
    table = make_table(TableSettings(max_age_updates=1, reuse_limit=1), latest_version=1)
    insert(table, *[make_group(f"g{i:02}", version=0 if i % 5 == 0 else 1) for i in range(20)])
    table.advance_version(2)

    drawn = [draw(table, 1, selector) for _ in range(16)]

    assert [ids(samples) for samples in drawn] == [[f"g{i:02}"] for i in range(20) if i % 5][::order]
    assert {samples[0].info.probability for samples in drawn} == {1.0}


@pytest.mark.parametrize(
    "weighting",
    [
        PriorityWeighting(),
        RecencyWeighting(half_life_updates=2.0),
        DifficultyWeighting(),
        RankWeighting(decay_per_use=0.5),
    ],
    ids=lambda weighting: weighting.by,
)
def test_a_batch_is_diverse_and_each_group_in_it_is_the_one_that_was_stored(
    make_table: TableFactory, weighting: Weighting
) -> None:
    table = make_table(TableSettings(weighting=weighting), RateLimiterSettings(min_size=8, error_buffer=1e9))
    stored = {
        f"g{i}": make_group(f"g{i}", prompt_id=f"p{i}", trajectories=[make_trajectory(response_ids=[i + 1] * (i + 1))])
        for i in range(24)
    }
    insert(table, *stored.values())

    for selector in (Fresh(), Fifo(), Lifo(), Uniform(), Mix(fresh=0.25), Weighted(by=weighting.by)):
        samples = draw(table, 8, selector)
        assert len({sample.group.group_id for sample in samples}) == 8, selector
        assert len({bytes(sample.group.trajectories[0].response_ids) for sample in samples}) == 8, selector
        for sample in samples:
            assert encode_group(sample.group) == encode_group(stored[sample.group.group_id])


@pytest.mark.parametrize("rest", [Fifo(), Uniform()], ids=lambda rest: rest.kind)
def test_mix_has_its_fresh_share_and_no_group_twice(make_table: TableFactory, rest: Fifo | Uniform) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdefgh"))

    draws = []
    while samples := draw(table, 4, Mix(fresh=0.5, rest=rest)):
        draws.append(samples)

    assert len(draws) in (2, 3)
    for samples in draws:
        assert len(set(ids(samples))) == 4
        assert [sample.info.times_sampled for sample in samples[:2]] == [1, 1]
        assert ids(samples)[:2] == sorted(ids(samples)[:2])
    assert table.stats().num_fresh < 2


def test_mix_with_fifo_rest_takes_the_oldest_others(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdefgh"))

    draws = [ids(draw(table, 4, Mix(fresh=0.25, rest=Fifo()))) for _ in range(3)]

    assert draws == [["a", "b", "c", "d"], ["e", "a", "b", "c"], ["f", "a", "b", "c"]]


def test_mix_with_uniform_rest_reaches_every_other_group(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(min_size=4, error_buffer=1e9))
    insert(table, *map(make_group, "abcd"))
    draw(table, 4)

    seen = set()
    for i in range(60):
        insert(table, make_group(f"n{i}"))
        samples = draw(table, 2, Mix(fresh=0.5))
        assert samples[0].group.group_id == f"n{i}"
        assert samples[1].info.probability == 1 / (4 + i)
        seen.add(samples[1].group.group_id)

    assert set("abcd") <= seen


@pytest.mark.parametrize("selector", [Fifo(), Uniform(), Fresh(), Mix(fresh=0.5)], ids=lambda selector: selector.kind)
def test_repeated_request_is_the_same_draw_counted_once(make_table: TableFactory, selector: Selector) -> None:
    table = make_table(TableSettings(reuse_limit=1), BATCHES)
    insert(table, *map(make_group, "abcdef"))

    first = draw(table, 3, selector, request_id="r")
    again = draw(table, 3, selector, request_id="r")

    assert len(first) == 3
    assert ids(again) == ids(first)
    assert [s.info for s in again] == [s.info for s in first]
    assert table.stats().sampled_total == 3
    assert table.stats().removed == {"reuse": 3}


def test_repeat_still_works_when_its_groups_were_evicted_or_aged_out_meanwhile(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_groups=4, max_age_updates=1), BATCHES)
    insert(table, *map(make_group, "abcd"))
    first = draw(table, 4, request_id="r")
    insert(table, *map(make_group, "ef"))
    table.advance_version(9)

    assert ids(draw(table, 4, request_id="r")) == ids(first) == ["a", "b", "c", "d"]
    assert table.stats().num_groups == 0


def test_repeat_window_ends(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(repeat_window_s=60), BATCHES)
    insert(table, *map(make_group, "abcdef"))
    draw(table, 2, Fresh(), request_id="r")

    clock.advance(59)
    within = draw(table, 2, Fresh(), request_id="r")
    clock.advance(1)
    after = draw(table, 2, Fresh(), request_id="r")

    assert (ids(within), ids(after)) == (["a", "b"], ["c", "d"])


def test_request_id_of_another_draw_is_a_conflict(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdef"))
    draw(table, 2, request_id="r")

    with pytest.raises(Conflict, match="'r' was used for another draw"):
        draw(table, 3, request_id="r")


def test_an_empty_answer_is_not_remembered(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)

    assert draw(table, 2, request_id="r") == []
    insert(table, *map(make_group, "abcd"))

    assert ids(draw(table, 2, request_id="r")) == ["a", "b"]


def test_age_is_learner_version_minus_the_oldest_span(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(min_size=3, error_buffer=1e9)
    table = make_table(TableSettings(foreign_share=1.0), limiter, latest_version=5)
    insert(table, make_group("a", version=2), make_group("b", version=5), make_group("f", version=None))

    assert [sample.info.age_updates for sample in draw(table, 3, learner_version=7)] == [5, 2, None]


def test_without_a_gate_no_age_is_too_old(make_table: TableFactory) -> None:
    table = make_table()
    insert(table, make_group("a"))

    assert draw(table, 1, learner_version=1_000_000)[0].info.age_updates == 1_000_000


def test_age_is_measured_from_the_published_version_when_the_learner_reports_an_older_one(
    make_table: TableFactory,
) -> None:
    table = make_table(latest_version=5)
    insert(table, make_group("a", version=4))

    assert draw(table, 1, learner_version=3)[0].info.age_updates == 1


@pytest.mark.parametrize(
    ("limiter", "num_groups", "selector", "message"),
    [
        (RateLimiterSettings(min_size=3, error_buffer=99), 4, Fifo(), "num_groups=4 is above limiter.min_size=3"),
        (RateLimiterSettings(min_size=9, error_buffer=4), 8, Fifo(), "does not fit error_buffer=4"),
    ],
    ids=["min_size", "error_buffer"],
)
def test_draw_that_could_never_be_served_is_refused(
    make_table: TableFactory, limiter: RateLimiterSettings, num_groups: int, selector: Selector, message: str
) -> None:
    table = make_table(limiter=limiter)

    with pytest.raises(InvalidRequest, match=message):
        draw(table, num_groups, selector)
