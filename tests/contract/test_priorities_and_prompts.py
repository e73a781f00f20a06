"""What the learner tells the table of groups, and what the table tells of prompts."""

import math

import pytest

from buffer.errors import InvalidRequest
from buffer.prompts import PromptStats
from buffer.rate_limiter import RateLimiterSettings
from buffer.selectors import Weighted
from buffer.table import PriorityUpdate, TableSettings
from buffer.types import Split
from buffer.weighting import PriorityWeighting, RankWeighting, RecencyWeighting, Weighting
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, ids, insert
from tests.factories import make_group

BY_PRIORITY = TableSettings(weighting=PriorityWeighting())


def test_unknown_ids_are_ignored_and_counted(make_table: TableFactory) -> None:
    table = make_table(BY_PRIORITY)
    insert(table, make_group("a"), make_group("e", split=Split.EVAL))

    update = table.update_priorities({"a": 2.0, "e": 2.0, "never-stored": 3.0})

    assert update == PriorityUpdate(updated=1, unknown=2)
    assert table.update_priorities({}) == PriorityUpdate(updated=0, unknown=0)


@pytest.mark.parametrize("bad", [math.nan, -0.5, math.inf, 1.1e18])
def test_a_priority_that_is_none_is_refused_and_nothing_is_changed(make_table: TableFactory, bad: float) -> None:
    table = make_table(TableSettings(weighting=RankWeighting()), RateLimiterSettings(min_size=2, error_buffer=9))
    insert(table, *map(make_group, "ab"))

    with pytest.raises(InvalidRequest, match="the priority of 'a' is"):
        table.update_priorities({"b": 5.0, "a": bad})

    assert ids(draw(table, 1, Weighted(by="rank"))) == ["a"]


@pytest.mark.parametrize("weighting", [None, RecencyWeighting(half_life_updates=1.0)], ids=["none", "recency"])
def test_priorities_that_would_change_nothing_are_refused(
    make_table: TableFactory, weighting: Weighting | None
) -> None:
    table = make_table(TableSettings(weighting=weighting))

    with pytest.raises(InvalidRequest, match=r"priorities would change nothing: table.weighting.by is"):
        table.update_priorities({"a": 1.0})


def test_new_groups_enter_with_the_largest_priority_posted_so_far(make_table: TableFactory) -> None:
    table = make_table(TableSettings(weighting=RankWeighting(decay_per_use=0.0)))
    insert(table, *map(make_group, "ab"))
    table.update_priorities({"a": 0.0, "b": 0.5})
    insert(table, make_group("c"))
    table.update_priorities({"b": 0.25})
    insert(table, make_group("d"))
    table.update_priorities({"c": 0.0})

    assert ids(draw(table, 1, Weighted(by="rank"))) == ["d"]
    table.update_priorities({"d": 0.125})
    assert ids(draw(table, 1, Weighted(by="rank"))) == ["b"]


def test_statistics_of_prompts_add_up_over_train_groups_and_outlive_them(make_table: TableFactory) -> None:
    table = make_table(TableSettings(reuse_limit=1, foreign_share=1.0), latest_version=5)
    insert(
        table,
        make_group("a", prompt_id="p1", rewards=(1.0, 0.0), version=3),
        make_group("b", prompt_id="p0", rewards=(0.5,), version=None),
        make_group("c", prompt_id="p1", rewards=(2.0, 0.25), version=5),
        make_group("c", prompt_id="p1", rewards=(2.0, 0.25), version=5),
        make_group("d", prompt_id="p1", rewards=(1.0,), version=2),
        make_group("e", prompt_id="p2", rewards=(1.0,), split=Split.EVAL),
    )
    draw(table, 1)

    page = table.prompts()

    assert page.prompts == [
        PromptStats(prompt_id="p0", seen=1, solved=0, reward_mean=0.5, last_version=None),
        PromptStats(prompt_id="p1", seen=5, solved=3, reward_mean=4.25 / 5, last_version=5),
    ]
    assert page.next_cursor is None
    assert table.stats().num_prompts == 2


def test_what_counts_as_solved_is_a_setting(make_table: TableFactory) -> None:
    table = make_table(TableSettings(solved_reward=0.5))
    insert(table, make_group("a", rewards=(0.5, 0.49, 1.0)))

    assert table.prompts().prompts[0].solved == 2


def test_pages_of_prompts_follow_each_other_and_end(make_table: TableFactory) -> None:
    table = make_table()
    insert(table, *[make_group(f"g{i}", prompt_id=f"p{i}", rewards=(0.0,)) for i in range(5)])

    first = table.prompts(limit=2)
    insert(table, make_group("again", prompt_id="p0"), make_group("behind", prompt_id="o9"))
    second = table.prompts(first.next_cursor or "", limit=2)
    last = table.prompts(second.next_cursor or "", limit=2)

    assert [[p.prompt_id for p in page.prompts] for page in (first, second, last)] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4"],
    ]
    assert last.next_cursor is None
    assert table.prompts("p4") == table.prompts("zzz")


@pytest.mark.parametrize("limit", [0, 1001])
def test_a_page_of_none_or_too_many_is_refused(make_table: TableFactory, limit: int) -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        make_table().prompts(limit=limit)


def test_the_prompt_without_a_group_for_longest_is_forgotten_first_and_counted(make_table: TableFactory) -> None:
    table = make_table(TableSettings(max_prompts=2))
    for group_id, prompt_id in (("a", "p0"), ("b", "p1"), ("c", "p0"), ("d", "p2")):
        insert(table, make_group(group_id, prompt_id=prompt_id))

    assert [p.prompt_id for p in table.prompts().prompts] == ["p0", "p2"]
    assert table.stats().forgotten_prompts_total == 1
