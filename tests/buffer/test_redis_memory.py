"""Redis takes no more memory than the settings allow, under load; and one that could not hold it is told at start."""

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from buffer.codec import encode_group
from buffer.errors import DrawLost, InvalidSettings
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisClient, connect
from buffer.redis_memory import AT_WORK_BYTES, check_memory, most_memory_bytes
from buffer.redis_server import RedisSettings, redis_server
from buffer.redis_table import RedisTable
from buffer.selectors import Uniform
from buffer.table import SampleRequest, TableSettings
from buffer.types import Group
from tests.factories import RUN_ID, make_group, make_trajectory

MIB = 1 << 20
SETTINGS = TableSettings(
    capacity_groups=400,
    capacity_bytes=6 * MIB,
    repeat_max_bytes=2 * MIB,
    partial_max_bytes=1 * MIB,
    reuse_limit=6,
    dedup_max_ids=500,
    max_prompts=200,
)
LIMITER = RateLimiterSettings(samples_per_insert=4, min_size=32, error_buffer=1e9)
WORKING_BYTES = 12 * MIB
"""In place of AT_WORK_BYTES: an empty Redis has 1 MiB, and the four threads of the test move at most 2 MiB each."""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[RedisClient]:
    with redis_server(tmp_path, RedisSettings(appendfsync="everysec")) as url, connect(url) as client:
        yield client


def test_memory_stays_under_its_cap_while_many_insert_and_draw_and_groups_leave(client: RedisClient) -> None:
    table = RedisTable(client, SETTINGS, LIMITER, RUN_ID)
    table.advance_version(0)
    numbers, inserted = itertools.count(), Event()
    in_use: list[int] = []

    def insert_four() -> None:
        groups = [large_group(f"g{next(numbers)}") for _ in range(4)]
        while groups:  # `full` until a reader was there
            results = table.insert(groups)
            groups = [group for group, one in zip(groups, results, strict=True) if one.outcome.value == "full"]
        in_use.append(used_bytes(client))

    def draw() -> None:
        request_id = f"r{next(numbers)}"
        request = SampleRequest(num_groups=32, learner_version=0, request_id=request_id, selector=Uniform())
        with suppress(DrawLost):  # the other reader's draws may have removed more than is kept
            table.sample(request)
        in_use.append(used_bytes(client))

    def draw_until_all_is_inserted() -> None:
        while not inserted.is_set():
            draw()

    for _ in range(20):  # nearly full
        insert_four()
    draw()
    for _ in range(10):  # used groups must make room, however fast the readers will be
        insert_four()
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(draw_until_all_is_inserted) for _ in range(2)]
        try:
            for writer in [pool.submit(insert_four) for _ in range(220)]:
                writer.result()
        finally:
            inserted.set()
        for reader in readers:
            reader.result()

    stats, cap_bytes = table.stats(), most_memory_bytes(SETTINGS, 1) - AT_WORK_BYTES + WORKING_BYTES
    assert stats.inserted_total == 1000
    assert 1000 * len(encode_group(large_group("g100"))) > 2 * cap_bytes
    assert max(in_use) < cap_bytes
    assert stats.removed["capacity"] > 0
    assert stats.removed["reuse"] > 0
    assert stats.dropped_repeats_total > 0
    assert stats.bytes <= SETTINGS.capacity_bytes


def large_group(group_id: str) -> Group:
    """Return a group of some 60 KB."""
    trajectories = [make_trajectory(f"{group_id}-{i}", response_ids=range(3300), reward=i) for i in range(2)]
    return make_group(group_id, prompt_id=f"p-{group_id}", trajectories=trajectories)


def used_bytes(client: RedisClient) -> int:
    """Return what counts against maxmemory."""
    memory: Any = client.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_not_counted_for_evict"])


def test_a_server_that_cannot_hold_the_groups_is_refused(client: RedisClient) -> None:
    client.config_set("maxmemory", 9 * MIB - 1)

    with pytest.raises(InvalidSettings, match=rf"Redis has maxmemory={9 * MIB - 1}, .* may take {9 * MIB} bytes"):
        check_memory(client, SETTINGS, RUN_ID)
    with pytest.raises(InvalidSettings, match=f"may take {18 * MIB} bytes"):
        check_memory(client, SETTINGS.model_copy(update={"shards": 2}), RUN_ID)


def test_a_server_that_may_be_too_small_for_what_comes_on_top_is_a_warning(
    client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    most_bytes = most_memory_bytes(SETTINGS, 1)
    client.config_set("maxmemory", most_bytes - 1)
    with caplog.at_level(logging.WARNING):
        check_memory(client, SETTINGS, RUN_ID)

    assert f"but this run may take {most_bytes} bytes" in caplog.text


@pytest.mark.parametrize("maxmemory", [0, most_memory_bytes(SETTINGS, 1)], ids=["no limit", "enough"])
def test_a_server_without_a_limit_or_with_a_high_one_is_not_worth_a_word(
    client: RedisClient, caplog: pytest.LogCaptureFixture, maxmemory: int
) -> None:
    client.config_set("maxmemory", maxmemory)
    check_memory(client, SETTINGS, RUN_ID)

    assert caplog.text == ""
