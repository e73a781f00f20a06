"""What several shards promise together: ids have one place, draws the shares of the whole, and a repeat one shard."""

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from buffer.browsing import GroupQuery
from buffer.codec import encode_group
from buffer.errors import InvalidRequest, InvalidSettings
from buffer.prompts import PromptStats
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisClient, connect
from buffer.redis_shards import claim_layout, open_table
from buffer.redis_table import RedisTable
from buffer.selectors import Fifo, Mix, Selector, Uniform, Weighted
from buffer.sharded_table import ShardedTable
from buffer.sharding import Opening, shard_of, shares
from buffer.table import SampleRequest, ServedTable, TableSettings
from buffer.transfer import stored_groups
from buffer.types import Sample, Split
from buffer.weighting import PriorityWeighting, RankWeighting, RecencyWeighting, Weighting
from tests.conftest import Clock
from tests.factories import RUN_ID, make_group, parts_of

NUM_SHARDS = 3
OPEN = RateLimiterSettings(min_size=1, error_buffer=1e9)
PAIRS = RateLimiterSettings(min_size=2, error_buffer=1e9)
NAMES = [f"g{number}" for number in range(12)]
CHI_SQUARE_11_999 = 31.26
"""What a true chi-square of 11 degrees of freedom exceeds once in 1000."""


@pytest.fixture
def client(redis_url: str) -> RedisClient:
    client = connect(redis_url)
    client.flushdb()
    return client


class Sharded:
    """A table of three shards, and the shards."""

    def __init__(
        self,
        client: RedisClient,
        *,
        weighting: Weighting | None = None,
        limiter: RateLimiterSettings = OPEN,
        clock: Clock | None = None,
    ) -> None:
        settings = TableSettings(shards=NUM_SHARDS, weighting=weighting)
        rng = random.Random(5)
        self.shards = [
            RedisTable(client, settings, limiter, RUN_ID, shard=shard, rng=rng, clock=clock or Clock())
            for shard in range(NUM_SHARDS)
        ]
        self.table = ShardedTable(self.shards, settings, limiter, rng=rng)
        self.table.advance_version(0)


def request(request_id: str, num_groups: int = 1, selector: Selector | None = None) -> SampleRequest:
    return SampleRequest(
        num_groups=num_groups, learner_version=0, request_id=request_id, selector=selector or Uniform()
    )


def ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.group.group_id for sample in samples]


def id_in(shard: int, start: int = 0) -> str:
    """Return an id of a shard."""
    return next(name for number in range(start, 1000) if shard_of(name := f"id{number}", NUM_SHARDS) == shard)


def test_ids_stay_where_they_are_for_ever() -> None:
    assert [shard_of(name, 3) for name in ("a", "b", "c", "group-1", "group-2", "é")] == [2, 2, 0, 1, 0, 0]
    spread = Counter(shard_of(f"actor-1-{number}", 4) for number in range(4000))
    assert all(900 < number < 1100 for number in spread.values())


def test_each_group_lies_in_the_shard_of_its_id_and_the_counters_add_up(client: RedisClient) -> None:
    sharded = Sharded(client, limiter=PAIRS)
    first = sharded.table.insert([make_group(name, rewards=(1.0, 0.5)) for name in NAMES])
    again = sharded.table.insert([make_group(name, rewards=(1.0, 0.5)) for name in reversed(NAMES)])
    sharded.table.insert([make_group("e", split=Split.EVAL), make_group("x", version=7)])
    parts = [part for name in ("p", "q") for part in parts_of(name, size=2)]
    held = sharded.table.insert_parts(parts)
    drawn = sharded.table.sample(request("r", 2))
    sharded.table.count_malformed(groups=1)

    assert [(result.group_id, result.outcome.value) for result in first] == [(name, "accepted") for name in NAMES]
    assert [(result.group_id, result.outcome.value) for result in again] == [
        (name, "duplicate") for name in reversed(NAMES)
    ]
    assert [result.outcome.value for result in held] == ["pending", "accepted"] * 2
    for name in NAMES:
        assert sharded.shards[shard_of(name, NUM_SHARDS)].get(name).group_id == name
        assert sharded.table.get(name).group_id == sharded.table.summary(name).group_id == name
    stats = sharded.table.stats()
    assert all(shard.stats().num_groups > 0 for shard in sharded.shards)
    assert stats.outcomes == {"accepted": 15, "duplicate": 12, "invalid": 2}
    assert stats.part_outcomes == {"pending": 4}
    assert (stats.num_groups, stats.num_eval, stats.inserted_total, stats.sampled_total) == (14, 1, 14, 2)
    assert stats.stored_uses == {0: 12, 1: 2}
    assert stats.stored_versions == {0: 14}
    assert (stats.reuse_mean, stats.limiter_error, stats.reward_sum) == (1.0, 12.0, 18.0)
    assert len(set(ids(drawn))) == 2


def test_single_groups_are_drawn_as_often_as_their_share_of_all_shards_says(client: RedisClient) -> None:
    sharded = Sharded(client, weighting=PriorityWeighting(exponent=1.0))
    sharded.table.insert([make_group(name) for name in NAMES])
    weights = {name: 1.0 + number for number, name in enumerate(NAMES)}
    sharded.table.update_priorities(weights)

    uniform: Counter[str] = Counter()
    weighted: Counter[str] = Counter()
    for number in range(600):
        (sample,) = sharded.table.sample(request(f"u{number}"))
        assert sample.info.probability == pytest.approx(1 / 12)
        assert sample.info.num_candidates == 12
        uniform[sample.group.group_id] += 1
        (sample,) = sharded.table.sample(request(f"w{number}", selector=Weighted(by="priority")))
        assert sample.info.probability == pytest.approx(weights[sample.group.group_id] / 78)
        assert sample.info.num_candidates == 12
        weighted[sample.group.group_id] += 1

    assert sum((uniform[name] - 50) ** 2 / 50 for name in NAMES) < CHI_SQUARE_11_999
    expected = {name: 600 * weight / 78 for name, weight in weights.items()}
    assert sum((weighted[name] - n) ** 2 / n for name, n in expected.items()) < CHI_SQUARE_11_999


def test_probability_counts_the_choice_of_the_shard_only_for_what_is_drawn_by_lot(client: RedisClient) -> None:
    sharded = Sharded(client, limiter=PAIRS)
    sharded.table.insert([make_group(name) for name in NAMES])
    stored = [shard.stats().num_groups for shard in sharded.shards]

    fifo = sharded.table.sample(request("f", 2, Fifo()))
    mixed = sharded.table.sample(request("m", 2, Mix(fresh=0.5)))

    shard = stored[shard_of(mixed[0].group.group_id, NUM_SHARDS)]
    assert [sample.info.probability for sample in fifo] == [1.0, 1.0]
    assert [sample.info.probability for sample in mixed] == [1.0, pytest.approx(1 / (shard - 1) * shard / 12)]
    assert [sample.info.num_candidates for sample in (*fifo, *mixed)] == [1, 1, 1, 11]


def test_recency_is_measured_alike_in_every_shard(client: RedisClient) -> None:
    assert shares([Opening(1.0, 0.0, 1), None, Opening(1.0, 1.0, 1)]) == [1 / 3, 0.0, 2 / 3]
    assert shares([Opening(1.0, -5000.0, 1), Opening(3.0, 5000.0, 1)]) == [0.0, 1.0]
    sharded = Sharded(client, weighting=RecencyWeighting(half_life_updates=1.0))
    sharded.table.advance_version(3)
    sharded.table.insert([make_group(name, version=number % 4) for number, name in enumerate(NAMES)])

    total = sum(2 ** (number % 4) for number in range(12))
    for number in range(20):
        (sample,) = sharded.table.sample(request(f"r{number}", selector=Weighted(by="recency")))
        version = NAMES.index(sample.group.group_id) % 4
        assert sample.info.probability == pytest.approx(2**version / total)


def test_repeat_is_the_same_draw_for_every_caller_at_once(client: RedisClient) -> None:
    limiter = RateLimiterSettings(samples_per_insert=1.0, min_size=2, error_buffer=2)
    callers = [Sharded(client, limiter=limiter).table for _ in range(4)]
    for number in range(200):  # as many as the limiter of each shard lets in
        callers[0].insert([make_group(f"g{number}")])

    def draw(caller: int) -> dict[str, list[str]]:
        # all shards run dry on the way: callers of one request meet shards that must wait
        return {f"r{number}": ids(callers[caller].sample(request(f"r{number}", 2))) for number in range(12)}

    with ThreadPoolExecutor(len(callers)) as pool:
        answers = list(pool.map(draw, range(len(callers))))

    draws = {name: {tuple(answer[name]) for answer in answers if answer[name]} for name in answers[0]}
    assert all(len(drawn) <= 1 for drawn in draws.values())
    num_drawn = sum(len(drawn) for drawn in draws.values())
    assert 0 < num_drawn < len(draws)
    assert callers[0].stats().sampled_total == 2 * num_drawn


def test_draw_whose_shard_must_wait_goes_to_another_one_for_good(client: RedisClient) -> None:
    limiter = RateLimiterSettings(min_size=1, error_buffer=2)
    sharded = Sharded(client, limiter=limiter)
    asked = request("r", 1, Fifo())
    home, other = sharded.shards[shard_of("r", NUM_SHARDS)], (shard_of("r", NUM_SHARDS) + 1) % NUM_SHARDS
    emptied = (other + 1) % NUM_SHARDS
    there, late = id_in(other), id_in(emptied)
    sharded.table.insert([make_group(there)])
    assert home.pin("r", choice=f"{emptied} 1.0 0") == f"{emptied} 1.0 0"  # when it still had a group

    drawn = sharded.table.sample(asked)
    sharded.table.insert([make_group(late)])

    assert ids(drawn) == [there]
    assert home.pin("r", choice=f"{emptied} 1.0 0") == f"{other} 1.0 0"
    assert sharded.shards[emptied].draw_or_leave(asked) is None  # a caller that was slow
    assert sharded.shards[emptied].look(asked) is None
    assert ids(sharded.table.sample(asked)) == [there]
    assert sharded.table.stats().sampled_total == 1


def test_learner_waits_while_all_shards_make_it_wait_and_actors_while_one_does(client: RedisClient) -> None:
    clock = Clock()
    sharded = Sharded(client, limiter=RateLimiterSettings(min_size=1, error_buffer=2), clock=clock)

    assert sharded.table.sample(request("r")) == []
    clock.advance(3)
    assert [(wait.who, wait.since_s) for wait in sharded.table.stats().waits] == [("learner", 3.0)]

    outcomes = [sharded.table.insert([make_group(id_in(1, start))])[0].outcome.value for start in range(0, 100, 10)]
    assert set(outcomes) == {"accepted", "full"}
    assert [wait.who for wait in sharded.table.stats().waits] == ["actors"]
    assert ids(sharded.table.sample(request("r"))) != []
    assert [wait.who for wait in sharded.table.stats().waits] == []


def test_pages_hold_every_group_once_and_each_shard_in_its_order(client: RedisClient) -> None:
    sharded = Sharded(client)
    for name in NAMES:
        sharded.table.insert([make_group(name, prompt_id=f"p{len(name)}")])
    sharded.table.insert([make_group(name) for name in NAMES])  # duplicates take numbers, too: there are gaps
    sharded.table.insert([make_group(f"late{number}") for number in range(4)])
    everything = [*NAMES, *(f"late{number}" for number in range(4))]

    for oldest_first in (True, False):
        for limit in (1, 3, 16, 100):
            found: list[str] = []
            query = GroupQuery(limit=limit, oldest_first=oldest_first)
            page = sharded.table.browse(query)
            found += [summary.group_id for summary in page.groups]
            while page.cursor is not None:
                page = sharded.table.browse(query.model_copy(update={"cursor": page.cursor}))
                found += [summary.group_id for summary in page.groups]
            assert sorted(found) == sorted(everything)
            for shard in range(NUM_SHARDS):
                own = [name for name in everything if shard_of(name, NUM_SHARDS) == shard]
                assert [name for name in found if name in own] == (own if oldest_first else own[::-1])
    of_prompt = sharded.table.browse(GroupQuery(prompt_id="p3", limit=100)).groups
    assert sorted(summary.group_id for summary in of_prompt) == ["g10", "g11"]
    assert sorted(group.group_id for group in stored_groups(sharded.table)) == sorted(everything)


def test_prompts_are_added_up_over_the_shards_page_by_page(client: RedisClient) -> None:
    sharded = Sharded(client)
    for number, name in enumerate(NAMES):
        sharded.table.insert([make_group(name, prompt_id=f"p{number % 5}", rewards=(1.0, 0.0))])

    pages = [sharded.table.prompts(limit=2)]
    while pages[-1].next_cursor is not None:
        pages.append(sharded.table.prompts(pages[-1].next_cursor, limit=2))

    assert [len(page.prompts) for page in pages] == [2, 2, 1]
    assert [stats for page in pages for stats in page.prompts] == [
        PromptStats(prompt_id=f"p{n}", seen=seen, solved=seen // 2, reward_mean=0.5, last_version=0)
        for n, seen in enumerate([6, 6, 4, 4, 4])
    ]


def test_bad_priority_changes_no_shard(client: RedisClient) -> None:
    sharded = Sharded(client, weighting=PriorityWeighting(exponent=1.0))
    sharded.table.insert([make_group(name) for name in NAMES])

    with pytest.raises(InvalidRequest, match="'g11' is -1"):
        sharded.table.update_priorities({name: -1.0 if name == "g11" else 0.0 for name in NAMES})
    unchanged = sharded.table.sample(request("r", selector=Weighted(by="priority")))
    update = sharded.table.update_priorities(dict.fromkeys([*NAMES, "gone"], 2.0))

    assert unchanged[0].info.probability == pytest.approx(1 / 12)
    assert (update.updated, update.unknown) == (12, 1)


def test_a_full_shard_with_too_little_for_a_draw_leaves_it_to_the_others(client: RedisClient) -> None:
    large = make_group(id_in(0), rewards=[0.0] * 200)
    settings = TableSettings(shards=NUM_SHARDS, capacity_bytes=len(encode_group(large)) + 500)
    table = open_table(client, settings, PAIRS, RUN_ID)
    table.advance_version(0)

    full = [result.outcome.value for result in table.insert([large, make_group(id_in(0, start=500))])]
    waits = table.sample(request("r", 2))
    table.insert([make_group(id_in(1)), make_group(id_in(1, start=500))])
    drawn = table.sample(request("r", 2))
    fill_all = [make_group(id_in(shard, start=700), rewards=[0.0] * 200) for shard in (1, 2)]
    table.insert([*fill_all, *(make_group(id_in(shard, start=900)) for shard in (1, 2))])

    assert full == ["accepted", "full"]
    assert waits == []
    assert sorted(ids(drawn)) == sorted([id_in(1), id_in(1, start=500)])
    with pytest.raises(InvalidRequest, match="the table has no room for more groups"):
        table.sample(request("s", 2))


def test_number_of_shards_is_fixed_for_the_life_of_a_run(client: RedisClient) -> None:
    claim_layout(client, TableSettings(shards=3), RUN_ID)
    claim_layout(client, TableSettings(shards=3), RUN_ID)
    open_table(client, TableSettings(), OPEN, "begun-before").advance_version(0)

    with pytest.raises(InvalidSettings, match=rf"table\.shards=2, but run {RUN_ID} was begun with 3"):
        claim_layout(client, TableSettings(shards=2), RUN_ID)
    with pytest.raises(InvalidSettings, match=r"table\.shards=4, but run begun-before was begun with 1"):
        claim_layout(client, TableSettings(shards=4), "begun-before")


def test_a_run_of_a_build_that_noted_no_weighting_keeps_its_weights(client: RedisClient) -> None:
    settings = TableSettings(weighting=RankWeighting())
    table = open_table(client, settings, OPEN, RUN_ID)
    table.advance_version(0)
    table.insert([make_group("a")])

    claim_layout(client, settings, RUN_ID)

    assert ids(table.sample(request("r", selector=Weighted(by="rank")))) == ["a"]


@pytest.mark.parametrize("shards", [1, 3])
def test_weighting_is_fixed_while_groups_are_stored(client: RedisClient, shards: int) -> None:
    def table(weighting: Weighting | None) -> ServedTable:
        settings = TableSettings(shards=shards, weighting=weighting, reuse_limit=1)
        claim_layout(client, settings, RUN_ID)
        table = open_table(client, settings, OPEN, RUN_ID)
        table.advance_version(0)
        return table

    by_rank, by_priority = RankWeighting(cool_down_updates=3), PriorityWeighting(exponent=1.0)
    table(None)
    table(by_rank).insert([make_group(name) for name in NAMES])

    for other in (None, by_priority, RankWeighting(cool_down_updates=4)):
        with pytest.raises(InvalidSettings, match=f"the stored groups of run {RUN_ID} have weights by .*rank"):
            table(other)
    for name in NAMES:
        assert table(by_rank).sample(request(name, selector=Weighted(by="rank")))
    emptied = table(by_priority)
    emptied.insert([make_group(f"next-{name}") for name in NAMES])
    drawn = [emptied.sample(request(f"next-{name}", selector=Weighted(by="priority"))) for name in NAMES]
    assert sorted(group_id for samples in drawn for group_id in ids(samples)) == sorted(
        f"next-{name}" for name in NAMES
    )
