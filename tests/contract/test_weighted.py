"""Weighted draws: which probabilities they state, and that they keep them."""

from collections import Counter
from collections.abc import Mapping

import pytest

from buffer.errors import InvalidRequest
from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Lifo, Mix, Selector, Weighted
from buffer.table import ReplayTable, TableSettings
from buffer.types import Split
from buffer.weighting import DifficultyWeighting, PriorityWeighting, RankWeighting, RecencyWeighting, Weighting
from tests.contract.conftest import OPEN, TableFactory
from tests.contract.helpers import draw, ids, insert
from tests.factories import make_group

PROPORTIONAL = TableSettings(weighting=PriorityWeighting(exponent=1.0))
BATCHES = RateLimiterSettings(samples_per_insert=1, min_size=4, error_buffer=1e9)
PRIORITY, RECENCY, DIFFICULTY, RANK = (
    Weighted(by="priority"),
    Weighted(by="recency"),
    Weighted(by="difficulty"),
    Weighted(by="rank"),
)
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 7: 24.32}
"""Degrees of freedom -> the value that a true chi-square exceeds once in 1000; the seeds are fixed."""


def chi_square(times: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Return the statistic of observed counts against expected shares of their sum."""
    total = sum(times.values())
    assert set(times) <= set(shares)
    return sum((times.get(name, 0) - total * share) ** 2 / (total * share) for name, share in shares.items())


def shares_of(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def count_draws(table: ReplayTable, num_draws: int, num_groups: int, selector: Selector) -> Counter[str]:
    """Draw again and again, and check what each draw says of itself: distinct groups, one probability per group."""
    times: Counter[str] = Counter()
    stated: dict[str, float] = {}
    for _ in range(num_draws):
        samples = draw(table, num_groups, selector)
        assert len(set(ids(samples))) == num_groups
        for sample in samples:
            name = sample.group.group_id
            assert stated.setdefault(name, sample.info.probability) == pytest.approx(sample.info.probability)
        times.update(ids(samples))
    return times


@pytest.mark.parametrize("num_groups", [1, 3])
def test_groups_are_drawn_as_often_as_their_share_of_the_weight_says(make_table: TableFactory, num_groups: int) -> None:
    table = make_table(PROPORTIONAL, RateLimiterSettings(min_size=3, error_buffer=1e9))
    weights = dict(zip("abcdefgh", (1.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0, 7.0), strict=True))
    insert(table, *map(make_group, weights))
    table.update_priorities(weights)

    times = count_draws(table, 900 // num_groups, num_groups, PRIORITY)

    assert chi_square(times, shares_of(weights)) < CHI_SQUARE_999[7]


def test_stated_probability_is_weight_over_total_eligible_weight(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=PriorityWeighting(exponent=0.5)), BATCHES)
    insert(table, *map(make_group, "abcd"))
    table.update_priorities({"a": 4.0, "b": 16.0, "c": 0.0, "d": 1.0})
    insert(table, make_group("e"))  # enters with the largest priority seen, 16

    drawn = draw(table, 4, PRIORITY)

    stated = {s.group.group_id: s.info.probability for s in drawn}
    assert stated == pytest.approx({"a": 2 / 11, "b": 4 / 11, "d": 1 / 11, "e": 4 / 11})
    assert {s.info.num_candidates for s in drawn} == {4}  # without c, which has no weight


def test_a_tiny_weight_is_not_lost_in_the_rounding_of_large_ones_that_left(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL)
    insert(table, make_group("tiny"), *[make_group(f"g{i}") for i in range(200)])
    table.update_priorities({f"g{i}": 0.3 for i in range(200)} | {"tiny": 1e-15})
    for _ in range(4):
        draw(table, 1, PRIORITY)

    table.update_priorities({f"g{i}": 0.0 for i in range(200)})
    drawn = draw(table, 1, PRIORITY)

    assert ids(drawn) == ["tiny"]
    assert drawn[0].info.probability == pytest.approx(1.0)


def test_a_changed_weight_changes_the_frequencies_at_once(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL)
    insert(table, *map(make_group, "abcd"))
    count_draws(table, 40, 1, PRIORITY)
    weights = {"a": 1e-9, "b": 1.0, "c": 3.0, "d": 6.0}
    table.update_priorities(weights)

    times = count_draws(table, 400, 1, PRIORITY)

    del weights["a"]
    assert times["a"] == 0
    assert chi_square(times, shares_of(weights)) < CHI_SQUARE_999[2]


def test_a_group_heavier_than_one_share_per_draw_is_in_every_draw_and_starves_no_other(
    make_table: TableFactory,
) -> None:
    table = make_table(PROPORTIONAL, BATCHES)
    insert(table, *map(make_group, "abcde"))
    table.update_priorities({"a": 1e6})
    draw(table, 2, PRIORITY)

    times = Counter(name for _ in range(150) for name in ids(draw(table, 2, PRIORITY)))

    assert times.pop("a") == 150
    assert chi_square(times, dict.fromkeys("bcde", 0.25)) < CHI_SQUARE_999[3]


def test_a_group_is_not_owed_for_ever_what_it_could_not_be_drawn(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL, BATCHES)
    insert(table, *map(make_group, "abcd"))
    table.update_priorities({"a": 1e6})
    for _ in range(60):
        draw(table, 2, PRIORITY)

    table.update_priorities({"b": 1e6, "c": 1e6, "d": 1e6})

    times = Counter(name for _ in range(100) for name in ids(draw(table, 1, PRIORITY)))
    assert times["a"] < 50  # 25 fair ones, and at most 8 or so owed


def test_recency_halves_the_weight_per_half_life_and_needs_no_update(make_table: TableFactory) -> None:
    settings = TableSettings(weighting=RecencyWeighting(half_life_updates=2.0))
    table = make_table(settings, BATCHES, latest_version=6)
    insert(table, *[make_group(name, version=version) for name, version in zip("abcd", (0, 2, 4, 6), strict=True)])

    first = {s.group.group_id: s.info.probability for s in draw(table, 4, RECENCY)}
    times = count_draws(table, 400, 1, RECENCY)

    assert first == pytest.approx({"a": 1 / 15, "b": 2 / 15, "c": 4 / 15, "d": 8 / 15})
    assert chi_square(times, first) < CHI_SQUARE_999[3]


def test_recency_stays_right_over_thousands_of_half_lives(make_table: TableFactory) -> None:
    settings = TableSettings(weighting=RecencyWeighting(half_life_updates=1.0), capacity_groups=8)
    table = make_table(settings, BATCHES)
    for version in range(0, 3000, 75):
        table.advance_version(version)
        insert(table, *[make_group(f"{name}{version}", version=version) for name in "abcd"])
        draw(table, 4, RECENCY)

    times = count_draws(table, 300, 1, RECENCY)

    newest = [f"{name}2925" for name in "abcd"]
    assert chi_square(times, dict.fromkeys(newest, 0.25)) < CHI_SQUARE_999[3]


def test_difficulty_prefers_prompts_that_are_solved_half_of_the_time(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=DifficultyWeighting()), BATCHES)
    insert(
        table,
        make_group("easy", prompt_id="p0", rewards=(1.0, 1.0, 1.0, 1.0)),
        make_group("half", prompt_id="p1", rewards=(1.0, 0.0, 2.0, 0.999)),
        make_group("hard", prompt_id="p2", rewards=(0.0, 0.0)),
        make_group("new", prompt_id="p3", rewards=(1.0, 0.0)),
    )
    weights = {"easy": 4 * 5 / 36, "half": 1.0, "hard": 4 * 3 / 16, "new": 1.0}

    stated = {s.group.group_id: s.info.probability for s in draw(table, 4, DIFFICULTY)}
    times = count_draws(table, 300, 1, DIFFICULTY)

    assert stated == pytest.approx(shares_of(weights))
    assert chi_square(times, shares_of(weights)) < CHI_SQUARE_999[3]


def test_difficulty_follows_the_statistics_of_the_prompt(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=DifficultyWeighting()), RateLimiterSettings(min_size=2, error_buffer=99))
    insert(
        table, make_group("a", prompt_id="p", rewards=(1.0, 0.0)), make_group("b", prompt_id="q", rewards=(1.0, 0.0))
    )

    insert(table, make_group("c", prompt_id="p", rewards=(1.0,) * 4))
    stated = {s.group.group_id: s.info.probability for s in (*draw(table, 2, DIFFICULTY), *draw(table, 2, DIFFICULTY))}

    now = 4 * 6 * 2 / 64  # p: 5 of 6 solved
    total = 2 * now + 1.0
    assert stated == {name: pytest.approx((1.0 if name == "b" else now) / total) for name in stated}
    assert len(stated) >= 2


def test_weights_left_behind_by_a_crowded_prompt_are_counted(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=DifficultyWeighting()))
    insert(table, *[make_group(f"g{i}", rewards=(0.0,)) for i in range(66)])

    assert table.stats().weights_left_behind_total == 1


def test_rank_takes_the_highest_priority_minus_reuse_and_ties_by_age(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=RankWeighting(decay_per_use=0.5)), BATCHES)
    insert(table, *map(make_group, "abcd"))
    table.update_priorities({"c": 2.0, "b": 0.25})

    draws = [ids(draw(table, 2, RANK)) for _ in range(4)]

    # c 2, a 1, d 1, b .25 -> c 1.5, a .5 -> c 1, d .5 -> a .5, c .5, d .5 ...
    assert draws == [["c", "a"], ["c", "d"], ["c", "a"], ["c", "d"]]


def test_cool_down_keeps_a_used_group_out_for_its_updates_whoever_used_it(make_table: TableFactory) -> None:
    settings = TableSettings(weighting=RankWeighting(cool_down_updates=3))
    table = make_table(settings, RateLimiterSettings(min_size=2, error_buffer=99))
    insert(table, *map(make_group, "abc"))

    draws = [ids(draw(table, 1))]  # fifo: a
    draws += [ids(draw(table, 2, RANK, learner_version=version)) for version in (0, 1, 2, 3)]

    assert draws == [["a"], ["b", "c"], [], [], ["a", "b"]]


def test_a_learner_that_waits_for_the_cool_down_lets_the_actors_go_on(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1, min_size=2, error_buffer=4)
    table = make_table(TableSettings(weighting=RankWeighting(cool_down_updates=9)), limiter)
    assert insert(table, *map(make_group, "abcdefg")) == ["accepted"] * 6 + ["full"]
    for _ in range(3):
        draw(table, 2, RANK)

    waited = draw(table, 2, RANK)
    wait = table.stats().waits[0]
    outcomes = insert(table, make_group("g"), make_group("h"))

    assert waited == []
    assert wait.who == "learner"
    assert "cool-down" in wait.reason
    assert outcomes == ["accepted"] * 2
    assert ids(draw(table, 2, RANK)) == ["g", "h"]


def test_a_draw_by_weight_waits_while_too_few_groups_have_any(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL, RateLimiterSettings(min_size=2, error_buffer=99))
    insert(table, *map(make_group, "ab"))
    table.update_priorities({"a": 0.0})

    waited = draw(table, 2, PRIORITY)
    insert(table, make_group("c"))

    assert waited == []
    assert set(ids(draw(table, 2, PRIORITY))) == {"b", "c"}


def test_weighted_rest_of_a_mix_never_repeats_its_fresh_part(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL, BATCHES)
    insert(table, *[make_group(f"g{i}") for i in range(40)])
    table.update_priorities({"g0": 50.0, "g1": 50.0})

    for _ in range(10):
        samples = draw(table, 4, Mix(fresh=0.5, rest=PRIORITY))
        assert len(set(ids(samples))) == 4
        assert [s.info.probability for s in samples[:2]] == [1.0, 1.0]
        assert all(0 < s.info.probability < 1 for s in samples[2:])
        assert [s.info.num_candidates for s in samples] == [1, 1, 38, 38]


def test_mix_with_lifo_rest_takes_the_newest_others(make_table: TableFactory) -> None:
    table = make_table(limiter=BATCHES)
    insert(table, *map(make_group, "abcdef"))

    draws = [ids(draw(table, 4, Lifo())), ids(draw(table, 4, Mix(fresh=0.25, rest=Lifo())))]

    assert draws == [["f", "e", "d", "c"], ["a", "f", "e", "d"]]


@pytest.mark.parametrize(
    ("weighting", "selector"),
    [
        (PriorityWeighting(), PRIORITY),
        (RecencyWeighting(half_life_updates=1.0), RECENCY),
        (DifficultyWeighting(), DIFFICULTY),
        (RankWeighting(), RANK),
        (None, Lifo()),
    ],
    ids=["priority", "recency", "difficulty", "rank", "lifo"],
)
def test_age_gate_reuse_limit_and_eval_hold_whatever_chooses(
    make_table: TableFactory, weighting: Weighting | None, selector: Selector
) -> None:
    settings = TableSettings(weighting=weighting, max_age_updates=2, reuse_limit=2)
    table = make_table(settings, RateLimiterSettings(min_size=2, error_buffer=99), latest_version=3)
    insert(table, make_group("old", version=1), make_group("eval", split=Split.EVAL, version=3))
    insert(table, *[make_group(name, version=3) for name in "abc"])
    table.advance_version(4)

    draws = [ids(draw(table, 2, selector, learner_version=4)) for _ in range(4)]

    times = Counter(name for drawn in draws for name in drawn)
    assert set(times) <= set("abc")
    assert max(times.values()) == 2
    assert table.stats().removed["age_unsampled"] == 1
    assert table.stats().removed["reuse"] == sum(n == 2 for n in times.values())


@pytest.mark.parametrize(
    ("weighting", "message"),
    [(None, "table.weighting.by is not set"), (RankWeighting(), "table.weighting.by is 'rank'")],
    ids=["none", "rank"],
)
def test_a_draw_by_another_weighting_is_refused(
    make_table: TableFactory, weighting: Weighting | None, message: str
) -> None:
    table = make_table(TableSettings(weighting=weighting), OPEN)

    for selector in (PRIORITY, Mix(fresh=0.5, rest=PRIORITY)):
        with pytest.raises(InvalidRequest, match=f"weighted by 'priority', but {message}"):
            draw(table, 1, selector)


def test_a_weighted_repeat_is_the_same_draw_and_does_not_move_the_clocks(make_table: TableFactory) -> None:
    table = make_table(PROPORTIONAL, BATCHES)
    insert(table, *map(make_group, "abcdefgh"))

    first = draw(table, 4, PRIORITY, request_id="r")
    again = draw(table, 4, PRIORITY, request_id="r")

    assert (ids(again), [s.info for s in again]) == (ids(first), [s.info for s in first])
    assert set(ids(draw(table, 4, PRIORITY))) & (set("abcdefgh") - set(ids(first)))
