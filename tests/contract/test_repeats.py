"""How long a draw can be repeated whose groups were removed since: within its window, and within a cap of bytes."""

import pytest

from buffer.errors import DrawLost
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import TableSettings
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert, size_bytes
from tests.factories import make_group

BATCHES = RateLimiterSettings(samples_per_insert=1, min_size=4, error_buffer=1e9)


def test_removed_groups_are_kept_for_repeats_up_to_a_cap_and_those_drawn_first_go_first(
    make_table: TableFactory, clock: Clock
) -> None:
    table = make_table(TableSettings(reuse_limit=1, repeat_max_bytes=2 * size_bytes("a")))
    insert(table, *map(make_group, "abc"))
    for number in range(3):
        draw(table, 1, request_id=f"r{number}")
        clock.advance(1)

    with pytest.raises(DrawLost, match="no longer kept"):
        draw(table, 1, request_id="r0")

    assert [ids(draw(table, 1, request_id=request_id)) for request_id in ("r1", "r2")] == [["b"], ["c"]]
    stats = table.stats()
    assert (stats.repeat_bytes, stats.dropped_repeats_total, stats.sampled_total) == (2 * size_bytes("a"), 1, 3)


def test_a_draw_beyond_the_cap_is_still_handed_out_whole_and_makes_way_at_the_next_removal(
    make_table: TableFactory, clock: Clock
) -> None:
    table = make_table(TableSettings(reuse_limit=1, repeat_max_bytes=1), BATCHES)
    insert(table, *map(make_group, "abcdefgh"))

    drawn = draw(table, 4, request_id="r")
    assert ids(drawn) == ids(draw(table, 4, request_id="r")) == ["a", "b", "c", "d"]
    clock.advance(1)
    draw(table, 4)

    with pytest.raises(DrawLost):
        draw(table, 4, request_id="r")
    assert table.stats().dropped_repeats_total == 4


def test_an_evicted_group_counts_from_its_last_use(make_table: TableFactory, clock: Clock) -> None:
    settings = TableSettings(capacity_groups=2, repeat_window_s=60, repeat_max_bytes=size_bytes("a"))
    table = make_table(settings)
    insert(table, make_group("a"))
    draw(table, 1, request_id="r0")
    clock.advance(30)
    insert(table, make_group("b"), make_group("c"))  # evicts a, of which 30 s are left

    kept = table.stats().repeat_bytes
    clock.advance(35)
    draw(table, 1)
    insert(table, make_group("d"))  # evicts b; nobody can ask for a any more

    assert (kept, table.stats().repeat_bytes, table.stats().dropped_repeats_total) == (
        size_bytes("a"),
        size_bytes("b"),
        0,
    )


def test_what_no_repeat_can_ask_for_any_more_is_dropped_by_the_clock(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(TableSettings(reuse_limit=1, repeat_window_s=60))
    insert(table, make_group("a"), make_group("b"))
    draw(table, 1)

    clock.advance(64)
    table.tidy()
    within = table.stats().repeat_bytes
    clock.advance(1)
    table.tidy()

    assert (within, table.stats().repeat_bytes) == (size_bytes("a"), 0)
    assert table.stats().dropped_repeats_total == 0
