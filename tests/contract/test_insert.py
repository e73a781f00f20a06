"""What every table answers to submitted groups."""

import pytest

from buffer.codec import encode_group
from buffer.errors import NotFound
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import TableSettings
from buffer.types import InsertOutcome, Split, VersionSpan
from tests.conftest import Clock
from tests.contract.conftest import OPEN, TableFactory
from tests.contract.helpers import draw, insert, size_bytes
from tests.factories import make_group, make_trajectory


def test_accepted_group_comes_back_bit_for_bit(make_table: TableFactory) -> None:
    table = make_table(latest_version=7)
    group = make_group(
        trajectories=[
            make_trajectory(
                "t0",
                response_mask=[True, False, True, True],
                spans=[VersionSpan(start=0, end=2, version=6), VersionSpan(start=2, end=4, version=7)],
                token_rewards=[0.0, 0.25, 0.0, 1.0],
                episode_id="e",
                columns={"entropy": [0.5, 0.0, 0.1, 0.2], "advantage": [1, 2, 3, 4]},
            ),
            make_trajectory("t1", response_ids=[3], kept_token_ids=[3, 4, 9], kept_token_counts=[3]),
        ]
    )

    assert insert(table, group) == ["accepted"]

    assert encode_group(table.get("g0")) == encode_group(group)
    assert encode_group(draw(table, 1, learner_version=7)[0].group) == encode_group(group)


def test_same_group_again_is_a_duplicate_and_changed_content_a_conflict(make_table: TableFactory) -> None:
    table = make_table()

    assert insert(table, make_group("a"), make_group("a"), make_group("a", rewards=(0.0, 0.0))) == [
        "accepted",
        "duplicate",
        "conflict",
    ]
    assert table.stats().num_groups == 1
    assert table.stats().outcomes == {"accepted": 1, "duplicate": 1, "conflict": 1}


def test_results_are_in_the_order_submitted_whatever_the_outcomes(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_group_bytes=size_bytes("a")))

    results = table.insert([make_group("a"), make_group("b", run_id="other"), make_group("c", rewards=(0.0,) * 9)])

    assert [(r.group_id, r.outcome) for r in results] == [
        ("a", InsertOutcome.ACCEPTED),
        ("b", InsertOutcome.INVALID),
        ("c", InsertOutcome.OVERSIZE),
    ]
    assert results[0].reason == ""
    assert "run_id" in results[1].reason
    assert f"the limit is {size_bytes('a')}" in results[2].reason


def test_group_from_an_unpublished_version_is_invalid(make_table: TableFactory) -> None:
    table = make_table(latest_version=-1)

    before = table.insert([make_group("a", version=0)])
    table.advance_version(3)
    after = table.insert([make_group("a", version=3), make_group("b", version=4)])

    assert [r.outcome.value for r in [*before, *after]] == ["invalid", "accepted", "invalid"]
    assert "version 4, the latest published version is 3" in after[1].reason


def test_group_over_the_age_gate_is_stale_on_arrival(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_age_updates=2), latest_version=5)
    two_versions = [VersionSpan(start=0, end=2, version=2), VersionSpan(start=2, end=4, version=5)]
    mixed = make_group("mixed", trajectories=[make_trajectory(spans=two_versions)])

    results = table.insert([make_group("old", version=2), make_group("edge", version=3), mixed])

    assert [r.outcome.value for r in results] == ["stale", "accepted", "stale"]
    assert "3 updates behind, and max_age_updates is 2" in results[0].reason


def test_capacity_evicts_only_sampled_groups_and_the_oldest_first(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_groups=3))
    insert(table, *[make_group(name) for name in "abc"])

    full = table.insert([make_group("d")])
    draw(table, 1)
    draw(table, 1)
    outcomes = insert(table, make_group("d"))

    assert full[0].outcome is InsertOutcome.FULL
    assert "3 groups" in full[0].reason
    assert outcomes == ["accepted"]
    with pytest.raises(NotFound):
        table.get("a")
    assert table.get("b").group_id == "b"
    assert table.stats().removed == {"capacity": 1}


def test_capacity_in_bytes_evicts_as_many_as_the_new_group_needs(make_table: TableFactory) -> None:
    large = make_group("L", rewards=(0.0,) * 8)
    limiter = RateLimiterSettings(min_size=3, error_buffer=1e9)
    table = make_table(TableSettings(capacity_bytes=len(encode_group(large)) + size_bytes("d")), limiter)
    insert(table, *[make_group(name) for name in "abcd"])
    draw(table, 3)

    assert insert(table, large) == ["accepted"]

    assert table.stats().removed == {"capacity": 3}
    assert table.stats().bytes == len(encode_group(large)) + size_bytes("d")


def test_an_insert_that_eviction_cannot_help_evicts_nothing(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_bytes=3 * size_bytes("a")))
    insert(table, *[make_group(name) for name in "abc"])
    draw(table, 1)

    assert insert(table, make_group("L", rewards=(0.0,) * 4)) == ["full"]

    assert table.stats().num_groups == 3


def test_group_larger_than_the_whole_table_is_oversize_not_full(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_bytes=size_bytes("a") - 1))

    assert insert(table, make_group("a")) == ["oversize"]


def test_id_of_a_removed_group_is_remembered_for_the_window(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(reuse_limit=1, dedup_window_s=100.0))
    insert(table, make_group("a"))
    clock.advance(50)
    draw(table, 1)

    clock.advance(99)
    within = insert(table, make_group("a"), make_group("a", rewards=(0.5,)))
    clock.advance(2)
    after = insert(table, make_group("a", rewards=(0.5,)))

    assert within == ["duplicate", "conflict"]
    assert after == ["accepted"]


def test_the_oldest_remembered_ids_are_forgotten_first_and_counted(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(reuse_limit=1, dedup_max_ids=2))
    for name in "abc":
        insert(table, make_group(name))
        draw(table, 1)
        clock.advance(1)

    outcomes = insert(table, make_group("a"), make_group("b"), make_group("c"))

    assert outcomes == ["accepted", "duplicate", "duplicate"]
    assert table.stats().forgotten_ids_total == 1


def test_foreign_groups_are_refused_by_default_and_admitted_up_to_their_share(make_table: TableFactory) -> None:
    closed, half = make_table(), None
    assert insert(closed, make_group("f", version=None)) == ["invalid"]

    half = make_table(TableSettings(foreign_share=0.5, max_age_updates=1), latest_version=9)
    outcomes = insert(
        half,
        make_group("f0", version=None),
        make_group("a", version=9),
        make_group("f0", version=None),
        make_group("f1", version=None),
    )

    assert outcomes == ["full", "accepted", "accepted", "full"]
    assert half.stats().num_foreign == 1
    assert half.stats().stored_versions == {9: 1}
    ages = [sample.info.age_updates for sample in (draw(half, 1, learner_version=9)[0], draw(half, 1)[0])]
    assert ages == [0, 0]


def test_eval_groups_are_stored_but_never_sampled_and_not_paced(make_table: TableFactory) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1, min_size=1, error_buffer=2)
    table = make_table(limiter=limiter)

    outcomes = insert(table, *[make_group(f"e{i}", split=Split.EVAL) for i in range(9)])

    assert outcomes == ["accepted"] * 9
    assert draw(table, 1) == []
    stats = table.stats()
    assert (stats.num_eval, stats.num_groups, stats.inserted_total, stats.num_fresh) == (9, 0, 0, 0)
    assert table.get("e3").split is Split.EVAL


def test_eval_groups_give_way_to_train_groups(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_groups=2))

    outcomes = insert(table, *[make_group(f"e{i}", split=Split.EVAL) for i in range(3)], *map(make_group, "abc"))

    assert outcomes == ["accepted"] * 5 + ["full"]
    assert (table.stats().num_eval, table.stats().num_groups) == (0, 2)


def test_a_refused_insert_leaves_nothing_behind(make_table: TableFactory) -> None:
    table = make_table(TableSettings(capacity_groups=1))
    insert(table, make_group("a"))
    before = table.stats()

    assert insert(table, make_group("b")) == ["full"]

    after = table.stats()
    assert after.model_copy(update={"outcomes": before.outcomes, "waits": []}) == before
    with pytest.raises(NotFound, match="'b' is not stored"):
        table.get("b")


def test_inserting_nothing_answers_nothing(make_table: TableFactory) -> None:
    assert make_table(limiter=OPEN).insert([]) == []
