"""What every table shows of its stored groups, page by page."""

from itertools import chain

import pytest
from pydantic import ValidationError

from buffer.browsing import GroupQuery, GroupSummary
from buffer.codec import encode_group
from buffer.errors import NotFound
from buffer.table import ReplayTable, TableSettings
from buffer.types import Split
from tests.conftest import Clock
from tests.contract.conftest import TableFactory
from tests.contract.helpers import draw, insert
from tests.factories import make_group


def pages(table: ReplayTable, query: GroupQuery) -> list[list[str]]:
    """Return the ids of each page, walking to the last one."""
    found: list[list[str]] = []
    while True:
        page = table.browse(query)
        found.append([summary.group_id for summary in page.groups])
        if page.cursor is None:
            return found
        query = query.model_copy(update={"cursor": page.cursor})


def test_summary_says_what_is_known_about_a_group(make_table: TableFactory, clock: Clock) -> None:
    table = make_table(latest_version=5)
    group = make_group("g", version=2, rewards=(1.0, 0.25, -0.5))
    inserted_s = clock()
    insert(table, group)
    draw(table, 1, learner_version=5)
    clock.advance(60)

    summary = table.summary("g")

    assert summary == GroupSummary(
        sequence=summary.sequence,
        group_id="g",
        prompt_id="p0",
        split=Split.TRAIN,
        inserted_s=inserted_s,
        oldest_version=2,
        age_updates=3,
        times_sampled=1,
        num_trajectories=3,
        num_response_tokens=group.num_response_tokens,
        bytes=len(encode_group(group)),
        mean_reward=0.25,
    )
    assert table.browse(GroupQuery()).groups == [summary]
    with pytest.raises(NotFound, match="'absent' is not stored"):
        table.summary("absent")


def test_foreign_group_has_no_age(make_table: TableFactory) -> None:
    table = make_table(TableSettings(foreign_share=1.0), latest_version=5)
    insert(table, make_group("g", version=None))

    summary = table.summary("g")

    assert (summary.oldest_version, summary.age_updates) == (None, None)


def test_pages_cover_both_splits_newest_first_and_on_request_oldest_first(make_table: TableFactory) -> None:
    table = make_table()
    for i, name in enumerate("abcdefghijkl"):
        insert(table, make_group(name, split=Split.EVAL if i % 3 == 0 else Split.TRAIN))

    assert pages(table, GroupQuery(limit=5)) == [list("lkjih"), list("gfedc"), list("ba")]
    assert pages(table, GroupQuery(limit=6, oldest_first=True)) == [list("abcdef"), list("ghijkl")]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (GroupQuery(split=Split.EVAL), ["e1", "e0"]),
        (GroupQuery(split=Split.TRAIN), ["c", "b", "a"]),
        (GroupQuery(prompt_id="p1"), ["e1", "b"]),
        (GroupQuery(prompt_id="p1", oldest_first=True), ["b", "e1"]),
        (GroupQuery(prompt_id="p9"), []),
        (GroupQuery(unused=True), ["c", "b"]),
    ],
)
def test_filter_finds_its_groups(make_table: TableFactory, query: GroupQuery, found: list[str]) -> None:
    table = make_table()
    insert(table, make_group("a"), make_group("b", prompt_id="p1"), make_group("e0", split=Split.EVAL))
    insert(table, make_group("c"), make_group("e1", split=Split.EVAL, prompt_id="p1"))
    draw(table, 1)

    assert pages(table, query) == [found]
    assert list(chain.from_iterable(pages(table, query.model_copy(update={"limit": 1})))) == found


def test_cursor_stays_good_while_groups_come_and_go(make_table: TableFactory) -> None:
    table = make_table(TableSettings(reuse_limit=1))
    insert(table, *[make_group(name) for name in "abcdef"])
    first = table.browse(GroupQuery(limit=2, oldest_first=True))
    newest = table.browse(GroupQuery(limit=2))

    insert(table, make_group("new"))
    for _ in range(3):
        draw(table, 1)

    assert pages(table, GroupQuery(oldest_first=True, cursor=first.cursor)) == [["d", "e", "f", "new"]]
    assert pages(table, GroupQuery(cursor=newest.cursor)) == [["d"]]


def test_removed_group_leaves_every_index(make_table: TableFactory) -> None:
    table = make_table(TableSettings(reuse_limit=1))
    insert(table, make_group("a"))
    draw(table, 1)

    for query in (GroupQuery(), GroupQuery(prompt_id="p0"), GroupQuery(split=Split.TRAIN), GroupQuery(unused=True)):
        assert pages(table, query) == [[]]


def test_two_filters_at_once_are_refused_because_no_index_has_them() -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        GroupQuery(prompt_id="p", unused=True)
