"""Inserts over HTTP: groups/s, trajectories/s, MB/s, latency, CPU and memory per group, as ratios to raw Redis."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.replay.payloads import RUN_ID, SHAPES, SIZES, Payload
from benchmarks.replay.product import Connection, Product, Service, insert_bodies
from benchmarks.replay.report import Timing, cpu_s, redis_cpu_s, table
from buffer.codec import encode_group
from buffer.wire import JSON, MSGPACK

_MOST_BYTES = 192 << 20
_MOST_GROUPS = 20_000
_MOST_JSON_TOKENS = 6_000_000
_PIPELINE = 64
_CONNECTIONS = {1: 2, 2: 6}
"""By API workers: what keeps them busy; the kernel gives a connection to either worker, so six are spread fairly."""
_CASES = ((1, MSGPACK, 1), (32, MSGPACK, 1), (32, MSGPACK, 2), (32, JSON, 1))
"""Groups a request, its form, API workers."""


@dataclass(frozen=True)
class Inserted:
    """What one case measured."""

    groups: int
    seconds: float
    latency: Timing
    api_cpu_s: float
    redis_cpu_s: float

    @property
    def per_s(self) -> float:
        """Groups a second."""
        return self.groups / self.seconds


def inserts(ours: Product, peer: dict[int, dict[str, float]], seconds: float) -> None:
    """Print the comparison with Reverb, then the table of shapes."""
    _beside_reverb(ours, peer, seconds)
    rows: list[list[object]] = []
    for payload in SHAPES:
        raw = raw_set(ours, payload, seconds)
        done = [_shape(ours, payload, *case, raw, seconds) for case in _CASES]
        in_json = done[-1][0]
        rows += [[*row, per_s / in_json] for per_s, row in done]
    heads = ["groups", "batch", "body", "workers", "groups/s", "trajectories/s", "MB/s", "p50 ms", "p99 ms"]
    heads += ["API CPU us/group", "Redis CPU us/group", "of raw SET", "bytes/token", "memory/payload", "of JSON"]
    table("Inserts over HTTP, everysec", heads, rows)


def _beside_reverb(ours: Product, peer: dict[int, dict[str, float]], seconds: float) -> None:
    rows = []
    for kb, payload in SIZES.items():
        bodies = bodies_of(payload, 32, MSGPACK)
        done = run(ours, ours.services[1], bodies, 32, MSGPACK, seconds)
        two = run(ours, ours.services[2], bodies, 32, MSGPACK, seconds, workers=2)
        raw = raw_set(ours, payload, seconds)
        theirs = peer.get(kb, {}).get("insert_per_s")
        ratio = None if theirs is None else done.per_s / theirs
        rows.append([payload.name, _size(payload), done.per_s, two.per_s, raw, theirs, ratio, done.per_s / raw])
    heads = [
        "payload",
        "bytes",
        "ours/s",
        "2 workers",
        "raw SET/s",
        "Reverb/s",
        "ours / Reverb",
        "ours / raw",
    ]
    table("Inserts beside Reverb, batches of 32", heads, rows)


def _shape(
    ours: Product, payload: Payload, batch: int, media_type: str, workers: int, raw: float, seconds: float
) -> tuple[float, list[object]]:
    """Return groups/s and the row of one case."""
    size = _size(payload)
    bodies = bodies_of(payload, batch, media_type)
    done = run(ours, ours.services[workers], bodies, batch, media_type, seconds, workers=workers)
    memory = _memory(ours)
    stored = ours.client.zcard(f"sw:{{{RUN_ID}:0}}:train")
    ours.client.flushall()
    memory -= _memory(ours)
    tokens = payload.group_size * (payload.tokens + payload.prompt_tokens)
    return done.per_s, [
        *(payload.name, batch, media_type.removeprefix("application/"), workers, done.per_s),
        *(done.per_s * payload.group_size, done.per_s * size / 1e6, done.latency.p50_ms, done.latency.p99_ms),
        *(1e6 * done.api_cpu_s / done.groups, 1e6 * done.redis_cpu_s / done.groups, done.per_s / raw),
        *(size / tokens, memory / (stored * size)),
    ]


def _size(payload: Payload) -> int:
    return len(encode_group(next(payload.groups(1))))


def _memory(ours: Product) -> int:
    """Return what Redis' data takes, once no rewrite of its file buffers anything."""
    while ours.is_rewriting():
        time.sleep(0.02)
    memory: Any = ours.client.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_aof_buffer"]) - int(memory["mem_clients_normal"])


def bodies_of(payload: Payload, batch: int, media_type: str) -> list[bytes]:
    """Return requests of distinct groups, as many as a case may need."""
    count = min(_MOST_GROUPS, _MOST_BYTES // _size(payload))
    if media_type == JSON:
        count = min(count, _MOST_JSON_TOKENS // (payload.group_size * payload.tokens))
    return insert_bodies(list(payload.groups(max(1, count // batch) * batch)), batch, media_type)


def raw_set(ours: Product, payload: Payload, seconds: float) -> float:
    """Return SETs a second of the same bytes in pipelines, the floor, under the same persistence."""
    ours.fresh_table()
    records = [encode_group(group) for group in payload.groups(16)]
    count, end, start = 0, time.perf_counter() + seconds, time.perf_counter()
    while time.perf_counter() < end and count * len(records[0]) < 4 * _MOST_BYTES:
        pipeline = ours.client.pipeline(transaction=False)
        for i in range(_PIPELINE):
            pipeline.set(f"raw:{count + i}", records[i % 16])
        pipeline.execute()
        count += _PIPELINE
    return count / (time.perf_counter() - start)


def run(
    ours: Product,
    served: Service,
    bodies: Sequence[bytes],
    batch: int,
    media_type: str,
    seconds: float,
    *,
    workers: int = 1,
    appendfsync: str = "everysec",
    appendonly: bool = True,
) -> Inserted:
    """Insert into a fresh table through some connections until the time or the bodies are over."""
    ours.fresh_table()
    Connection(served.address).post("/v1/groups", bodies[0], media_type)
    ours.fresh_table(appendfsync, appendonly=appendonly)
    taken, times, lock = iter(bodies), list[float](), threading.Lock()
    end = time.perf_counter() + seconds

    def work(connection: Connection) -> None:
        while time.perf_counter() < end:
            with lock:
                body = next(taken, None)
            if body is None:
                return
            start = time.perf_counter()
            connection.post("/v1/groups", body, media_type)
            times.append(time.perf_counter() - start)

    before = cpu_s(served.pid), redis_cpu_s(ours.client)
    start = time.perf_counter()
    with ThreadPoolExecutor(_CONNECTIONS[workers]) as pool:
        list(pool.map(work, [Connection(served.address) for _ in range(_CONNECTIONS[workers])]))
    spent = time.perf_counter() - start
    api, server = cpu_s(served.pid) - before[0], redis_cpu_s(ours.client) - before[1]
    return Inserted(len(times) * batch, spent, Timing(times), api, server)
