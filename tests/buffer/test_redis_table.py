"""What only a table on Redis can meet: full memory, a lost server, a forgotten script, keys of other runs."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from buffer.browsing import GroupQuery
from buffer.errors import StoreUnavailable
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisClient, connect
from buffer.redis_server import RedisSettings, redis_server
from buffer.redis_table import RedisTable
from buffer.selectors import Fifo, Weighted
from buffer.table import SampleRequest, TableSettings
from buffer.types import InsertResult, Split
from buffer.weighting import DifficultyWeighting, RankWeighting, RecencyWeighting, Weighting
from buffer.wire import LearnerReport
from services.presence import Presence, RedisBoard
from tests.conftest import Clock
from tests.factories import RUN_ID, make_group, parts_of

OPEN = RateLimiterSettings(min_size=1, error_buffer=1e9)


@pytest.fixture
def client(redis_url: str) -> RedisClient:
    client = connect(redis_url)
    client.flushdb()
    return client


def open_table(client: RedisClient, settings: TableSettings | None = None, *, run_id: str = RUN_ID) -> RedisTable:
    table = RedisTable(client, settings or TableSettings(), OPEN, run_id)
    table.advance_version(0)
    return table


def request(request_id: str) -> SampleRequest:
    return SampleRequest(num_groups=1, learner_version=0, request_id=request_id)


def test_full_memory_refuses_inserts_whole_and_lets_the_learner_make_room(client: RedisClient) -> None:
    table = open_table(client, TableSettings(reuse_limit=1))
    table.insert([make_group("a"), make_group("b")])
    before = client.hgetall(f"sw:{{{RUN_ID}:0}}:stats")

    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable, match="Redis is out of memory"):
            table.insert([make_group("c")])
        with pytest.raises(StoreUnavailable, match="Redis is out of memory"):
            table.insert_parts(parts_of("d", size=2))
        table.tidy()
        after = client.hgetall(f"sw:{{{RUN_ID}:0}}:stats")
        drawn = table.sample(request("r"))
        table.advance_version(1)
    finally:
        client.config_set("maxmemory", 0)

    assert after == before
    assert drawn[0].group.group_id == "a"
    assert table.stats().removed == {"reuse": 1}
    assert table.insert([make_group("c")])[0].outcome.value == "accepted"


@pytest.mark.parametrize(
    "weighting",
    [None, RankWeighting(cool_down_updates=9), DifficultyWeighting(), RecencyWeighting(half_life_updates=1)],
)
def test_every_key_of_a_run_is_described_in_the_schema(client: RedisClient, weighting: Weighting | None) -> None:
    table = open_table(client, TableSettings(weighting=weighting))
    table.insert([make_group("a"), make_group("b"), make_group("e", split=Split.EVAL)])
    selector = Fifo() if weighting is None else Weighted(by=weighting.by)
    table.sample(request("r").model_copy(update={"selector": selector}))
    table.insert_parts(parts_of("p", size=2)[:1])
    spent = open_table(client, TableSettings(reuse_limit=1, weighting=weighting))
    spent.sample(request("s"))
    presence = Presence(RedisBoard(client, key=f"sw:{{{RUN_ID}:0}}:presence"))
    presence.report(LearnerReport(updates=1, version=1, metrics={}))

    header = (files("buffer") / "lua" / "common.lua").read_text().partition("\n\n")[0]
    described = set(re.findall(r"^-- (\w+):?\S* +(?:hash|zset|string) ", header, re.MULTILINE))
    prefix = f"sw:{{{RUN_ID}:0}}:"
    keys: Any = client.keys(prefix + "*")
    names = {key.decode().removeprefix(prefix).partition(":")[0] for key in keys}

    assert len(names) > 9
    assert names <= described


@pytest.mark.parametrize(
    ("make_refuse", "make_accept", "sentence"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "this Redis is a read-only replica"),
        (
            ("CONFIG", "SET", "min-replicas-to-write", "1"),
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
            "Redis has too few replicas to write",
        ),
    ],
)
def test_a_redis_that_takes_no_writes_is_unavailable_until_it_does(
    client: RedisClient, make_refuse: tuple[str, ...], make_accept: tuple[str, ...], sentence: str
) -> None:
    table, board = open_table(client), RedisBoard(client, key="board")
    table.insert([make_group("a")])

    client.execute_command(*make_refuse)  # type: ignore[no-untyped-call]
    try:
        for call in (
            lambda: table.insert([make_group("b")]),
            lambda: table.sample(request("r")),
            lambda: table.insert_parts(parts_of("c", size=2)),
            lambda: board.put("actor", "note"),
            lambda: board.claim("evaluation", "note"),
        ):
            with pytest.raises(StoreUnavailable, match=sentence):
                call()
    finally:
        client.execute_command(*make_accept)  # type: ignore[no-untyped-call]

    assert table.insert([make_group("b")])[0].outcome.value == "accepted"
    assert board.claim("evaluation", "note")


def test_lowered_caps_take_effect_with_what_comes_next(client: RedisClient) -> None:
    roomy = open_table(client, TableSettings(reuse_limit=1))
    roomy.insert([make_group(f"g{number}", prompt_id=f"p{number}") for number in range(20)])
    for number in range(20):
        roomy.sample(request(f"r{number}"))

    lowered = open_table(client, TableSettings(reuse_limit=1, dedup_max_ids=3, max_prompts=2))
    lowered.insert([make_group("last", prompt_id="last")])
    lowered.sample(request("last"))

    stats = lowered.stats()
    assert (stats.num_prompts, stats.forgotten_prompts_total, stats.forgotten_ids_total) == (2, 19, 18)


def test_lost_server_is_store_unavailable_for_every_call(tmp_path: Path) -> None:
    with redis_server(tmp_path, RedisSettings()) as url:
        table = open_table(connect(url))

    for call in (
        lambda: table.insert([make_group("a")]),
        lambda: table.insert([make_group("a", run_id="other")]),
        lambda: table.sample(request("r")),
        lambda: table.insert_parts(parts_of("b", size=2)),
        lambda: table.summary("a"),
        lambda: table.browse(GroupQuery()),
        table.tidy,
        lambda: table.count_malformed(groups=1),
        lambda: table.advance_version(1),
        lambda: table.get("a"),
        table.stats,
    ):
        with pytest.raises(StoreUnavailable, match="Redis does not answer"):
            call()


def test_scripts_are_loaded_again_after_redis_forgot_them(client: RedisClient) -> None:
    table = open_table(client)
    table.insert([make_group("a")])

    client.script_flush()
    outcomes = [result.outcome.value for result in table.insert([make_group("a"), make_group("b")])]
    client.script_flush()

    assert outcomes == ["duplicate", "accepted"]
    assert len(table.sample(request("r"))) == 1


def test_two_runs_on_one_redis_do_not_meet(client: RedisClient) -> None:
    one, other = open_table(client, run_id="one"), open_table(client, run_id="other")

    one.insert([make_group("a", run_id="one")])

    assert (one.stats().num_groups, other.stats().num_groups) == (1, 0)


def test_all_keys_of_a_table_share_one_hash_slot_and_nothing_stays_of_removed_groups(
    client: RedisClient, clock: Clock
) -> None:
    table = RedisTable(client, TableSettings(reuse_limit=1, max_age_updates=0), OPEN, RUN_ID, clock=clock)
    table.advance_version(0)
    table.insert([make_group(f"g{i}", prompt_id=f"p{i % 3}") for i in range(20)])
    for i in range(10):
        table.sample(request(f"r{i}"))
    clock.advance(65)
    table.advance_version(1)

    keys = {key.decode() for key in client.scan_iter()}

    assert all(key.startswith(f"sw:{{{RUN_ID}:0}}:") for key in keys)
    assert not any(":body:" in key for key in keys)
    lasting = {key.rsplit(":", 1)[-1] for key in keys if client.pttl(key) == -1}
    assert lasting == {"stats", "remembered", "remembered_at", "prompts", "prompt_ids", "prompts_seen"}


def test_tables_in_two_processes_share_one_draw_history(client: RedisClient) -> None:
    one, other = open_table(client), open_table(client)
    one.insert([make_group("a"), make_group("b")])

    first = one.sample(request("r"))
    again = other.sample(request("r"))

    assert first[0].group.group_id == again[0].group.group_id
    assert other.stats().sampled_total == 1


def test_partial_groups_survive_a_kill_of_redis_and_of_the_worker_that_sealed_one(tmp_path: Path) -> None:
    first, second = parts_of("open", size=2)
    sealed = parts_of("sealed", size=2)
    with redis_server(tmp_path, RedisSettings()) as url:
        client = connect(url)
        table = open_table(client)
        table.insert_parts([first, sealed[0]])
        with pytest.raises(Killed):
            TableOfAKilledWorker(client, TableSettings(), OPEN, RUN_ID).insert_parts([sealed[1]])
        os.kill(client.info("server")["process_id"], signal.SIGKILL)

    with redis_server(tmp_path, RedisSettings()) as url:
        table = open_table(connect(url))
        before = table.stats()
        retried = table.insert_parts([sealed[1]])
        completed = table.insert_parts([first, second])
        after = table.stats()

    assert (before.num_partial_groups, before.num_groups) == (2, 0)
    assert [result.outcome.value for result in [*retried, *completed]] == ["accepted", "duplicate", "accepted"]
    assert (after.num_partial_groups, after.partial_bytes, after.num_groups) == (0, 0, 2)


def test_janitors_of_many_workers_at_once_do_everything_exactly_once(client: RedisClient, clock: Clock) -> None:
    settings = TableSettings(partial_group_timeout_s=10, ttl_s=5)
    tables = [RedisTable(client, settings, OPEN, RUN_ID, clock=clock) for _ in range(4)]
    tables[0].advance_version(0)
    for i in range(30):
        tables[0].insert([make_group(f"old{i}")])
        tables[0].insert_parts(parts_of(f"few{i}", size=3)[:1])
        tables[0].insert_parts(parts_of(f"enough{i}", size=3)[:2])
    clock.advance(10)

    with ThreadPoolExecutor(len(tables)) as pool:
        for done in [pool.submit(table.tidy) for table in tables]:
            done.result()

    stats = tables[0].stats()
    assert stats.removed == {"ttl_unsampled": 30, "partial_timeout": 30}
    assert (stats.num_groups, stats.outcomes["accepted"], stats.inserted_total) == (30, 60, 60)
    assert (stats.num_partial_groups, stats.partial_bytes) == (0, 0)
    assert not [key for key in client.scan_iter() if b":partial" in key or key.endswith(b":sealed")]


def test_browsing_a_large_table_takes_no_more_steps_than_a_small_one(client: RedisClient) -> None:
    table = open_table(client)
    table.insert([make_group(f"g{i}") for i in range(5)])
    queries = [GroupQuery(limit=1), GroupQuery(limit=1, prompt_id="p0"), GroupQuery(limit=1, unused=True)]

    def commands() -> list[int]:
        counts = []
        for query in queries:
            before = client.info("stats")["total_commands_processed"]
            table.browse(query)
            counts.append(client.info("stats")["total_commands_processed"] - before)
        return counts

    commands()  # loads the script
    few = commands()
    table.insert([make_group(f"g{i}") for i in range(5, 500)])

    assert commands() == few


class Killed(Exception):
    """Stands for kill -9."""


class TableOfAKilledWorker(RedisTable):
    """A table whose process dies between sealing a group and inserting it."""

    def _insert_sealed(self, group_id: str) -> InsertResult | None:
        raise Killed
