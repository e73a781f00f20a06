"""Inserts over HTTP: groups/s, trajectories/s, MB/s, latency, CPU and memory per group, as ratios to raw Redis."""

import threading
import time
from dataclasses import dataclass

from benchmarks.replay.payloads import SHAPES, SIZES, Payload
from benchmarks.replay.product import Connection, Product, insert_bodies
from benchmarks.replay.report import Timing, cpu_s, redis_cpu_s, table
from buffer.codec import encode_group
from buffer.wire import JSON, MSGPACK

_MOST_BYTES = 192 << 20
_PIPELINE = 64


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
    """Print the table of shapes, then the comparison with Reverb."""
    rows = []
    for payload in SHAPES:
        for batch, media_type, services in ((1, MSGPACK, 1), (32, MSGPACK, 1), (32, MSGPACK, 2), (32, JSON, 1)):
            rows.append(_row(ours, payload, batch, media_type, services, seconds))
    heads = ["groups", "batch", "body", "APIs", "groups/s", "trajectories/s", "MB/s", "p50 ms", "p99 ms"]
    heads += ["API CPU us/group", "Redis CPU us/group", "of raw SET", "bytes/token", "memory/payload"]
    table("Inserts over HTTP, everysec", heads, rows)
    rows = []
    for kb, payload in SIZES.items():
        size = _size(payload)
        done = run(ours, payload, 32, MSGPACK, 1, seconds)
        two = run(ours, payload, 32, MSGPACK, 2, seconds)
        raw = raw_set(ours, payload, seconds)
        theirs = peer.get(kb, {}).get("insert_per_s")
        ratio = None if theirs is None else done.per_s / theirs
        rows.append([payload.name, size, done.per_s, two.per_s, raw, theirs, ratio, done.per_s / raw])
    heads = ["payload", "bytes", "ours/s, 1 API", "2 APIs", "raw SET/s", "Reverb/s", "ours / Reverb", "ours / raw"]
    table("Inserts beside Reverb, batches of 32", heads, rows)


def _size(payload: Payload) -> int:
    return len(encode_group(next(payload.groups(1))))


def _row(ours: Product, payload: Payload, batch: int, media_type: str, services: int, seconds: float) -> list[object]:
    size = _size(payload)
    raw = raw_set(ours, payload, seconds / 2)
    done = run(ours, payload, batch, media_type, services, seconds)
    memory = ours.client.info("memory")["used_memory"]
    stored = ours.client.zcard(_key("train"))
    ours.client.flushall()
    memory -= ours.client.info("memory")["used_memory"]
    tokens = payload.group_size * (payload.tokens + payload.prompt_tokens)
    return [
        *(payload.name, batch, media_type.removeprefix("application/"), services, done.per_s),
        *(done.per_s * payload.group_size, done.per_s * size / 1e6, done.latency.p50_ms, done.latency.p99_ms),
        *(1e6 * done.api_cpu_s / done.groups, 1e6 * done.redis_cpu_s / done.groups, done.per_s / raw),
        *(size / tokens, memory / (stored * size)),
    ]


def _key(name: str) -> str:
    return f"sw:{{benchmark:0}}:{name}"


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


def run(ours: Product, payload: Payload, batch: int, media_type: str, services: int, seconds: float) -> Inserted:
    """Insert distinct groups through two connections to each API until the time or the groups are over."""
    count = max(batch * 8, min(60_000, _MOST_BYTES // _size(payload) // (2 if media_type == JSON else 1)))
    count = min(count, 3_000) if media_type == JSON else count
    ours.fresh_table()
    bodies = insert_bodies(list(payload.groups(count)), batch, media_type)
    connections = [Connection(url) for url in ours.urls[:services] for _ in range(2)]
    taken, times, lock = iter(bodies), [], threading.Lock()
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

    before = cpu_s(ours.pids), redis_cpu_s(ours.client)
    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    api, server = cpu_s(ours.pids) - before[0], redis_cpu_s(ours.client) - before[1]
    return Inserted(len(times) * batch, spent, Timing(times), api, server)
