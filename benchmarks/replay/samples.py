"""Batches of 256 groups drawn by weight: over HTTP, from Redis directly, drawn ahead; beside Reverb and raw MGET."""

import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.replay.payloads import SIZES, Payload
from benchmarks.replay.product import Connection, Product, sample_request
from benchmarks.replay.report import Timing, table, timed
from buffer.client import HttpTable
from buffer.codec import encode_group
from buffer.connection import ServiceClient
from buffer.redis_table import RedisTable
from buffer.selectors import Weighted
from buffer.table import ReplayTable, SampleRequest
from buffer.wire import MSGPACK, encode
from learner.sampling import Prefetcher
from learner.settings import LearnerSettings

BATCH = 256
_REPEATS = 30
_BY_PRIORITY = Weighted(by="priority")


def samples(ours: Product, peer: dict[int, dict[str, float]], seconds: float) -> None:
    """Print one row for each payload."""
    rows, ratios = [], []
    for kb, payload in SIZES.items():
        timings, two_ahead = _measured(ours, payload, seconds)
        rows.append([payload.name, *map(_pair, timings), *two_ahead, BATCH * 1000 / timings[-1].p50_ms])
        if theirs := peer.get(kb):
            client_ms, dataset_ms = theirs["sample_p50_ms"], theirs["dataset_ms"]
            over = [client_ms / timing.p50_ms for timing in timings[1:]]
            ratios.append([payload.name, client_ms, dataset_ms, *over, *(dataset_ms / ms for ms in two_ahead)])
    heads = ["payload", "raw MGET", "HTTP, bytes", "HTTP, records", "direct, bytes", "direct, records"]
    heads += ["2 ahead, bytes", "2 ahead, records, collated", "groups/s, direct records"]
    table("Batches of 256 by weight: ms, p50 / p99", heads, rows)
    heads = ["payload", "Reverb client ms", "Reverb dataset ms", "HTTP, bytes", "HTTP, records", "direct, bytes"]
    heads += ["direct, records", "2 ahead, bytes / dataset", "2 ahead, records / dataset"]
    table("How many times faster than Reverb's client (the last two: than its dataset)", heads, ratios)


def _measured(ours: Product, payload: Payload, seconds: float) -> tuple[list[Timing], list[float]]:
    """Return the times of a batch by each way to it, and ms per batch where two are drawn ahead."""
    size = len(encode_group(next(payload.groups(1))))
    direct = fill(ours, payload, max(1000, min(20_000, (200 << 20) // size)))
    numbers = itertools.count()
    keys = list(itertools.islice(ours.client.scan_iter("*body:*", count=1000), BATCH))
    connection = Connection(ours.services[1].address)
    client = ServiceClient("http://{}:{}".format(*ours.services[1].address))
    http = HttpTable(client)
    ways: list[Callable[[], object]] = [
        lambda: raw_mget(ours, keys, size),
        lambda: connection.post("/v1/sample", encode(sample_request(next(numbers), BATCH), MSGPACK)),
        lambda: http.sample(_request(numbers)),
        lambda: list(direct.sample_encoded(_request(numbers))),
        lambda: direct.sample(_request(numbers)),
    ]
    timings = [timed(way, repeats=_REPEATS, limit_s=seconds) for way in ways]
    client.close()
    return timings, [
        bytes_ahead(lambda: list(direct.sample_encoded(_request(numbers))), seconds),
        ahead(direct, seconds),
    ]


def fill(ours: Product, payload: Payload, count: int) -> RedisTable:
    """Return a fresh table with so many groups and weights 1 to 7."""
    direct = ours.fresh_table()
    groups = list(payload.groups(count))
    for i in range(0, count, 64):
        direct.insert(groups[i : i + 64])
    direct.update_priorities({group.group_id: 1.0 + i % 7 for i, group in enumerate(groups)})
    return direct


def raw_mget(ours: Product, keys: list[bytes], size: int) -> list[Any]:
    """Read bodies in replies of at most 8 MB."""
    step = max(1, (8 << 20) // size)
    return [ours.client.mget(keys[i : i + step]) for i in range(0, len(keys), step)]


def bytes_ahead(draw: Callable[[], object], seconds: float) -> float:
    """Return ms per batch of encoded groups that a thread draws two batches ahead, taken back to back."""
    with ThreadPoolExecutor(1) as pool:
        drawn = deque(pool.submit(draw) for _ in range(2))
        drawn.popleft().result()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            drawn.append(pool.submit(draw))
            drawn.popleft().result()
            count += 1
        return 1000 * (time.perf_counter() - start) / count


def ahead(table_: ReplayTable, seconds: float) -> float:
    """Return ms per batch of the learner's prefetcher, two batches ahead, taken back to back."""
    settings = LearnerSettings(prefetch_batches=2, groups_per_update=BATCH)
    prefetcher = Prefetcher(
        table_.sample,
        table_.stats,
        settings,
        clock=lambda: 0,
        schedule=itertools.repeat(_BY_PRIORITY),
        request_prefix=f"ahead{time.time_ns()}",
        now=time.monotonic,
    )
    with prefetcher:
        prefetcher.take(timeout_s=60)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            assert prefetcher.take(timeout_s=60) is not None
            count += 1
        return 1000 * (time.perf_counter() - start) / count


def _request(numbers: "itertools.count[int]") -> SampleRequest:
    return SampleRequest(num_groups=BATCH, learner_version=0, request_id=f"r{next(numbers)}", selector=_BY_PRIORITY)


def _pair(timing: Timing) -> str:
    return f"{timing.p50_ms:.3g} / {timing.p99_ms:.3g}"
