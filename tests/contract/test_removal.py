"""How groups leave, each under its own name, and what the counters say."""

import pytest

from buffer.codec import encode_group, encode_trajectory
from buffer.errors import NotFound
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import TableSettings, TableStats
from buffer.types import Split
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert
from tests.factories import make_group, parts_of


def test_age_gate_removes_at_publication_and_counts_unused_groups_apart(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_age_updates=2), latest_version=1)
    insert(table, make_group("a", version=0), make_group("b", version=0), make_group("c", version=1))
    draw(table, 1, learner_version=1)

    table.advance_version(3)

    assert table.stats().removed == {"age": 1, "age_unsampled": 1}
    assert ids(draw(table, 1, learner_version=3)) == ["c"]


def test_age_gate_closes_at_consumption_even_before_a_version_is_published(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_age_updates=2), latest_version=1)
    insert(table, make_group("a", version=0), make_group("b", version=1))

    drawn = draw(table, 1, learner_version=3)

    assert ids(drawn) == ["b"]
    assert table.stats().removed == {"age_unsampled": 1}
    assert table.stats().latest_version == 1


def test_version_never_goes_back(make_table: TableFactory) -> None:
    table = make_table(latest_version=5)

    table.advance_version(3)

    assert table.stats().latest_version == 5


def test_ttl_removes_groups_after_their_time(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(ttl_s=10))
    insert(table, make_group("a"), make_group("e", split=Split.EVAL))
    clock.advance(6)
    insert(table, make_group("b"))
    draw(table, 1)

    clock.advance(4)
    drawn = draw(table, 1)

    assert ids(drawn) == ["b"]
    assert table.stats().removed == {"ttl": 2}
    clock.advance(99)
    draw(table, 1)
    assert table.stats().num_groups == 0


def test_ttl_counts_unused_groups_apart(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(ttl_s=10))
    insert(table, make_group("a"))

    clock.advance(10)

    assert draw(table, 1) == []
    assert table.stats().removed == {"ttl_unsampled": 1}


def test_reuse_limit_removes_after_the_last_use(make_table: TableFactory) -> None:
    table = make_table(TableSettings(reuse_limit=2))
    insert(table, make_group("a"))

    uses = [draw(table, 1)[0].info.times_sampled for _ in range(2)]

    assert uses == [1, 2]
    assert draw(table, 1) == []
    with pytest.raises(NotFound):
        table.get("a")


def test_a_thousand_and_more_overdue_groups_leave_at_once(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_age_updates=0, ttl_s=1e6))
    insert(table, *[make_group(f"g{i}", rewards=(0.0,)) for i in range(1100)])

    table.advance_version(1)

    assert table.stats().removed == {"age_unsampled": 1100}


def test_every_counter_is_true_after_a_mixed_history(make_table: TableFactory, clock: Clock) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1, min_size=2, error_buffer=100)
    table = make_table(TableSettings(reuse_limit=2, foreign_share=0.5), limiter, latest_version=3)
    insert(
        table,
        make_group("a", version=1, rewards=(1.0, 0.5)),
        make_group("b", version=3, rewards=(0.25, -1.0, 2.0)),
        make_group("c", version=3),
        make_group("f", version=None),
        make_group("e", split=Split.EVAL),
        make_group("a", version=1, rewards=(1.0, 0.5)),
        make_group("z", version=4),
    )
    draw(table, 2, learner_version=3)
    draw(table, 1, learner_version=3)
    table.insert_parts(parts_of("p", size=2)[:1])

    stored = [table.get(name) for name in "bcf"]
    assert table.stats() == TableStats(
        num_groups=3,
        num_fresh=2,
        num_eval=1,
        num_foreign=1,
        bytes=sum(len(encode_group(group)) for group in [*stored, table.get("e")]),
        num_response_tokens=sum(group.num_response_tokens for group in stored),
        inserted_total=4,
        sampled_total=3,
        reuse_mean=1.5,
        outcomes={"accepted": 5, "duplicate": 1, "invalid": 1},
        part_outcomes={"pending": 1},
        num_partial_groups=1,
        partial_bytes=len(encode_trajectory(parts_of("p", size=2)[0].trajectory)),
        repeat_bytes=len(encode_group(make_group("a", version=1, rewards=(1.0, 0.5)))),
        dropped_repeats_total=0,
        removed={"reuse": 1},
        forgotten_ids_total=0,
        num_prompts=1,
        forgotten_prompts_total=0,
        weights_left_behind_total=0,
        stored_versions={3: 2},
        stored_uses={0: 2, 1: 1},
        reward_sum=1.5 + 1.25 + 1.0 + 1.0,
        num_trajectories_total=9,
        latest_version=3,
        limiter_error=1.0,
        waits=[],
    )


def test_an_empty_table_has_empty_counters(make_table: TableFactory) -> None:
    stats = make_table(latest_version=-1).stats()

    assert (stats.latest_version, stats.num_groups, stats.bytes, stats.outcomes, stats.waits) == (-1, 0, 0, {}, [])
    assert stats.reuse_mean == 0.0
