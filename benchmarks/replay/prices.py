"""What each promise of an insert costs for groups of 8 x 1,024 tokens: by step, end to end, by policy of the file."""

import time
from collections.abc import Callable

import msgpack

from benchmarks.replay.inserts import bodies_of, run
from benchmarks.replay.payloads import SHAPES
from benchmarks.replay.product import Product, insert_bodies, service
from benchmarks.replay.report import redis_cpu_s, table
from buffer.codec import encode_group, record_hash
from buffer.quick import intact_group, valid_group
from buffer.types import Group
from buffer.wire import MSGPACK, decode

_COUNT = 512
_BATCH = 32


def prices(ours: Product, seconds: float) -> None:
    """Print the steps of the API process, then Redis by policy."""
    payload = SHAPES[1]
    groups = list(payload.groups(_COUNT))
    bodies = insert_bodies(groups, _BATCH, MSGPACK)
    plain = decode(bodies[0], MSGPACK)["groups"]
    records = [encode_group(group) for group in groups[:_BATCH]]
    structure = _cpu_us(lambda: [intact_group(record) for record in plain], seconds)
    rows = [
        ["msgpack to values, with limits on containers", _cpu_us(lambda: decode(bodies[0], MSGPACK), seconds)],
        ["the same without limits", _cpu_us(lambda: msgpack.unpackb(bodies[0]), seconds)],
        ["values to records, structure only", structure],
        ["validation of the values", _cpu_us(lambda: [valid_group(r) for r in plain], seconds) - structure],
        ["validation by pydantic instead of both", _cpu_us(lambda: [Group.model_validate(r) for r in plain], seconds)],
        ["canonical record", _cpu_us(lambda: [encode_group(group) for group in groups[:_BATCH]], seconds)],
        ["idempotency: content hash", _cpu_us(lambda: [record_hash(record) for record in records], seconds)],
    ]
    table("CPU of the API process for a group of 8 x 1,024 tokens, by step", ["step", "us/group"], rows)
    _end_to_end(ours, seconds)
    rows = []
    for name, policy, persistent in (
        ("no file", "no", False),
        ("file, fsync by the kernel", "no", True),
        ("everysec", "everysec", True),
        ("always", "always", True),
    ):
        rows.append([name, *_stored(ours, groups, policy, persistent)])
    heads = ["append-only file", "our script: wall us/group", "Redis CPU us/group", "raw SET: wall", "Redis CPU"]
    table("Redis for a group of 8 x 1,024 tokens, by persistence", heads, rows)


def _end_to_end(ours: Product, seconds: float) -> None:
    """Print inserts over HTTP with ever fewer promises."""
    payload = SHAPES[1]
    bodies = bodies_of(payload, _BATCH, MSGPACK)
    rows: list[list[object]] = []
    for name, policy, persistent, without in (
        ("always", "always", True, ()),
        ("everysec", "everysec", True, ()),
        ("fsync by the kernel", "no", True, ()),
        ("no file", "no", False, ()),
        ("and no validation of values", "no", False, ("validation",)),
        ("and no content hash", "no", False, ("validation", "idempotency")),
    ):
        ours.persist("everysec")  # a service refuses to start on a Redis without a file
        with service(ours.directory / f"without{len(rows)}", ours.redis_url, without=without) as served:
            arguments = (ours, served, bodies, _BATCH, MSGPACK, seconds)
            done = run(*arguments, appendfsync=policy, appendonly=persistent)
        cpus = [1e6 * done.api_cpu_s / done.groups, 1e6 * done.redis_cpu_s / done.groups]
        rows.append([name, done.per_s, done.per_s * payload.group_size, done.latency.p50_ms, *cpus])
    heads = ["promises", "groups/s", "trajectories/s", "p50 ms", "API CPU us/group", "Redis CPU us/group"]
    table("Inserts over HTTP with promises off, one after the other; batches of 32", heads, rows)


def _stored(ours: Product, groups: list[Group], policy: str, persistent: bool) -> list[float]:
    """Return wall and Redis CPU per group of our script, then of raw SETs."""
    direct = ours.fresh_table(policy, appendonly=persistent)
    submitted = [(direct.facts_for_insert(group, record := encode_group(group)), record) for group in groups]
    ours_us = _redis_us(ours, lambda: direct.run_insert(submitted))
    ours.client.flushall()
    return [*ours_us, *_redis_us(ours, lambda: _raw(ours, [record for _, record in submitted]))]


def _cpu_us(operation: Callable[[], object], seconds: float) -> float:
    """Return the CPU of this process per group, the least of some rounds."""
    best, end = float("inf"), time.perf_counter() + seconds / 4
    while time.perf_counter() < end or best == float("inf"):
        start = time.process_time()
        for _ in range(5):
            operation()
        best = min(best, (time.process_time() - start) / 5)
    return 1e6 * best / _BATCH


def _redis_us(ours: Product, operation: Callable[[], object]) -> tuple[float, float]:
    before, start = redis_cpu_s(ours.client), time.perf_counter()
    operation()
    return 1e6 * (time.perf_counter() - start) / _COUNT, 1e6 * (redis_cpu_s(ours.client) - before) / _COUNT


def _raw(ours: Product, records: list[bytes]) -> None:
    for start in range(0, len(records), _BATCH):
        pipeline = ours.client.pipeline(transaction=False)
        for i, record in enumerate(records[start : start + _BATCH]):
            pipeline.set(f"raw:{start + i}", record)
        pipeline.execute()
