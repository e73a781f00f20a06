"""What every table does with groups that arrive one trajectory at a time."""

import pytest

from buffer.codec import encode_group, encode_trajectory
from buffer.errors import NotFound
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import ReplayTable, TableSettings
from buffer.types import Part, Split
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert
from tests.factories import make_group, parts_of


def submit(table: ReplayTable, *parts: Part) -> list[str]:
    """Insert parts in one call and return the outcomes."""
    return [result.outcome.value for result in table.insert_parts(parts)]


def test_group_can_be_sampled_once_its_last_trajectory_arrived_whatever_their_order(make_table: TableFactory) -> None:
    table = make_table()
    first, second, third = parts_of("g", size=3)

    results = table.insert_parts([third, first])
    before = draw(table, 1)
    last = table.insert_parts([second])

    assert [result.outcome.value for result in results] == ["pending", "pending"]
    assert [(r.group_id, r.trajectory_id) for r in results] == [("g", "g-2"), ("g", "g-0")]
    assert "2 of 3 trajectories are held" in results[1].reason
    assert before == []
    assert (last[0].outcome.value, last[0].reason) == ("accepted", "")
    assert encode_group(draw(table, 1)[0].group) == encode_group(make_group("g", rewards=(0.0,) * 3))
    assert table.stats().outcomes == {"accepted": 1}
    assert table.stats().part_outcomes == {"pending": 3}


def test_parts_and_the_whole_group_are_the_same_group(make_table: TableFactory) -> None:
    table = make_table()
    submit(table, *parts_of("g", size=2))

    assert insert(table, make_group("g", rewards=(0.0, 0.0))) == ["duplicate"]


def test_same_trajectory_again_is_a_duplicate_before_and_after_its_group_is_stored(make_table: TableFactory) -> None:
    table = make_table()
    first, second = parts_of("g", size=2)

    outcomes = [submit(table, part)[0] for part in (first, first, second, second, first)]

    assert outcomes == ["pending", "duplicate", "accepted", "duplicate", "duplicate"]
    assert table.stats().part_outcomes == {"pending": 2, "duplicate": 3}
    assert table.stats().num_groups == 1


def test_other_content_under_a_known_trajectory_id_is_a_conflict(make_table: TableFactory) -> None:
    table = make_table()
    first, second = parts_of("g", size=2)
    changed = first.model_copy(update={"trajectory": first.trajectory.model_copy(update={"reward": 0.5})})

    outcomes = [submit(table, part)[0] for part in (first, changed, second, changed)]

    assert outcomes == ["pending", "conflict", "accepted", "conflict"]


@pytest.mark.parametrize("change", [{"prompt_id": "other"}, {"split": Split.EVAL}, {"group_size": 3}])
def test_part_that_says_otherwise_about_its_group_is_a_conflict(
    make_table: TableFactory, change: dict[str, object]
) -> None:
    table = make_table()
    first, second = parts_of("g", size=2)
    submit(table, first)

    results = table.insert_parts([second.model_copy(update=change)])

    assert results[0].outcome.value == "conflict"
    assert "prompt_id, split or group_size" in results[0].reason
    assert table.stats().num_groups == 0


def test_trajectory_too_many_finds_its_group_closed(make_table: TableFactory) -> None:
    table = make_table()
    submit(table, *parts_of("g", size=2))
    extra = parts_of("g", size=3)[2]

    assert submit(table, extra) == ["group_closed"]


def test_overdue_group_is_inserted_with_enough_trajectories_and_dropped_with_fewer(
    make_table: TableFactory, clock: Clock
) -> None:
    table = make_table(TableSettings(partial_group_timeout_s=60, min_group_size=2))
    enough, few = parts_of("enough", size=4), parts_of("few", size=4)
    submit(table, enough[0], few[0])
    clock.advance(59)
    table.tidy()
    submit(table, enough[2])

    clock.advance(1)
    table.tidy()

    group = table.get("enough")
    assert [trajectory.trajectory_id for trajectory in group.trajectories] == ["enough-0", "enough-2"]
    assert submit(table, enough[0], enough[1], few[1]) == ["duplicate", "group_closed", "group_closed"]
    assert insert(table, make_group("few", rewards=(0.0,) * 4)) == ["conflict"]
    stats = table.stats()
    assert stats.removed == {"partial_timeout": 1}
    assert (stats.num_groups, stats.num_partial_groups, stats.partial_bytes) == (1, 0, 0)
    assert ids(draw(table, 1)) == ["enough"]


def test_complete_group_waits_for_the_limiter_like_any_other(make_table: TableFactory) -> None:
    table = make_table(limiter=RateLimiterSettings(min_size=1, error_buffer=2))
    insert(table, *[make_group(f"g{i}") for i in range(3)])
    first, second = parts_of("p", size=2)

    full = submit(table, first, second)
    again = submit(table, second)
    table.tidy()
    unsampled = table.stats()
    draw(table, 1)
    table.tidy()

    assert (full, again) == (["pending", "full"], ["full"])
    assert (unsampled.num_groups, unsampled.num_partial_groups) == (3, 1)
    assert unsampled.waits[0].who == "actors"
    assert (table.stats().num_groups, table.stats().num_partial_groups) == (4, 0)
    assert submit(table, second) == ["duplicate"]


def test_group_that_must_wait_does_not_hold_up_those_behind_it_for_ever(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(partial_group_timeout_s=60), RateLimiterSettings(min_size=1, error_buffer=2))
    insert(table, *[make_group(f"g{i}") for i in range(3)])
    submit(table, *parts_of("a-train", size=3)[:2], *parts_of("b-eval", size=3, split=Split.EVAL)[:2])
    clock.advance(60)

    for _ in range(3):
        table.tidy()
        clock.advance(1)

    stats = table.stats()
    assert (stats.num_eval, stats.num_groups, stats.num_partial_groups) == (1, 3, 1)


def test_full_answer_to_the_last_part_becomes_accepted_when_it_is_sent_again(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_groups=1))
    insert(table, make_group("a"))
    parts = parts_of("p", size=2)

    outcomes = [submit(table, *parts)[1]]
    draw(table, 1)
    outcomes += submit(table, parts[1])

    assert outcomes == ["full", "accepted"]
    assert table.stats().removed == {"capacity": 1}


def test_group_that_aged_while_it_was_partial_is_refused_as_a_whole(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_age_updates=1), latest_version=0)
    old, _, young = parts_of("g", size=3)
    submit(table, old)
    table.advance_version(2)
    fresh = parts_of("g", size=3, version=2)

    outcomes = submit(table, young, fresh[1], fresh[2])

    assert outcomes == ["stale", "pending", "stale"]
    assert submit(table, fresh[1]) == ["group_closed"]
    stats = table.stats()
    assert (stats.outcomes, stats.num_groups, stats.num_partial_groups) == ({"stale": 1}, 0, 0)


def test_hopeless_trajectory_is_refused_at_once_and_opens_no_group(make_table: TableFactory) -> None:
    table = make_table()
    unpublished, foreign = parts_of("v", size=2, version=1)[0], parts_of("f", size=2, version=None)[0]
    other_run = parts_of("r", size=2, run_id="other")[0]

    assert submit(table, unpublished, foreign, other_run) == ["invalid"] * 3
    assert table.stats().num_partial_groups == 0
    assert table.stats().part_outcomes == {"invalid": 3}


def test_partial_groups_are_bounded_in_number(make_table: TableFactory) -> None:
    table = make_table(TableSettings(partial_max_groups=2))
    a, b, c = (parts_of(name, size=2) for name in "abc")

    outcomes = submit(table, a[0], b[0], c[0], a[1]) + submit(table, c[0])

    assert outcomes == ["pending", "pending", "full", "accepted", "pending"]


def test_partial_groups_are_bounded_in_bytes(make_table: TableFactory) -> None:
    a, b = parts_of("a", size=4), parts_of("b", size=4)
    size = len(encode_trajectory(a[0].trajectory))
    table = make_table(TableSettings(partial_max_bytes=size + len(encode_trajectory(b[1].trajectory)) - 1))

    results = table.insert_parts([a[0], b[1]])

    assert [result.outcome.value for result in results] == ["pending", "full"]
    assert f"1 partial groups of {size} bytes are held" in results[1].reason
    assert table.stats().partial_bytes == size


def test_trajectory_that_makes_its_group_too_large_is_oversize(make_table: TableFactory) -> None:
    group_bytes = len(encode_group(make_group("g", rewards=(0.0, 0.0))))
    tight = make_table(TableSettings(max_group_bytes=group_bytes - 1))
    assert submit(tight, *parts_of("g", size=2)) == ["pending", "oversize"]

    roomy = make_table(TableSettings(max_group_bytes=group_bytes + 4))
    assert submit(roomy, *parts_of("g", size=2)) == ["pending", "accepted"]


def test_eval_groups_can_come_in_parts(make_table: TableFactory) -> None:
    table = make_table()

    assert submit(table, *parts_of("e", size=2, split=Split.EVAL)) == ["pending", "accepted"]
    assert table.stats().num_eval == 1


def test_whole_group_under_the_id_of_a_partial_one_wins(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(partial_group_timeout_s=60))
    parts = parts_of("g", size=3)
    submit(table, *parts[:2])

    assert insert(table, make_group("g", rewards=(0.0,) * 3)) == ["accepted"]
    assert submit(table, parts[0], parts[2]) == ["duplicate", "duplicate"]
    clock.advance(60)
    table.tidy()

    assert table.stats().outcomes == {"accepted": 1, "conflict": 1}
    assert (table.stats().num_partial_groups, table.stats().partial_bytes) == (0, 0)
    assert len(table.get("g").trajectories) == 3


def test_tidy_removes_what_is_overdue_without_a_caller(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(ttl_s=10))
    insert(table, make_group("a"))
    clock.advance(10)

    table.tidy()

    assert table.stats().removed == {"ttl_unsampled": 1}
    with pytest.raises(NotFound):
        table.get("a")


def test_malformed_submissions_are_counted_as_invalid(make_table: TableFactory) -> None:
    table = make_table()

    table.count_malformed(groups=3, parts=2)

    assert (table.stats().outcomes, table.stats().part_outcomes) == ({"invalid": 3}, {"invalid": 2})
