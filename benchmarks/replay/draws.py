"""The weighted draw alone: Redis' own CPU for 256 groups by table size, and how true the frequencies are."""

import itertools
import random
from collections import Counter

import msgpack

from benchmarks.replay.payloads import TINY
from benchmarks.replay.product import Product
from benchmarks.replay.report import redis_cpu_s, table, timed
from buffer.codec import encode_group
from buffer.redis_table import RedisTable
from buffer.selectors import Weighted
from buffer.table import SampleRequest

_BATCH = 256
_CLASSES = 7
_CHUNK = 2000


def draws(ours: Product, sizes: list[int], seconds: float) -> None:
    """Print one row for each size of the table."""
    rows = (_row(ours, size, seconds) for size in sizes)  # each is printed as soon as it is there
    heads = ["groups", "Redis CPU ms", "p50 ms", "p99 ms", "memory/group", "worst frequency / weight - 1"]
    table(f"Draw of {_BATCH} by weight, ids and facts only, everysec", heads, rows)


def _row(ours: Product, size: int, seconds: float) -> list[object]:
    direct = fill(ours, size)
    memory = ours.client.info("memory")["used_memory"] / size
    numbers = itertools.count()
    for _ in range(10):
        draw(direct, numbers)
    before = redis_cpu_s(ours.client)
    timing = timed(lambda: draw(direct, numbers), repeats=200, limit_s=seconds)
    cpu_ms = 1000 * (redis_cpu_s(ours.client) - before) / (len(timing.times_s) + 1)
    off = frequencies(direct, numbers, num_draws=2000 if seconds > 1 else 400) if size == 100_000 else None
    return [f"{size:,}", cpu_ms, timing.p50_ms, timing.p99_ms, memory, off]


def fill(ours: Product, size: int) -> RedisTable:
    """Return a fresh table of tiny groups of weight 1 to 7, stored by the product's script without a file."""
    direct = ours.fresh_table(appendonly=False)
    record = encode_group(next(TINY.groups(1)))
    rng = random.Random(0)
    group = next(TINY.groups(1))
    for start in range(0, size, _CHUNK):
        facts = direct.facts_for_insert(group, record)
        direct.run_insert(
            [
                (facts | {"group_id": f"g{i}", "prompt_id": f"p{i % 1000}", "lot": rng.expovariate(1.0)}, record)
                for i in range(start, min(start + _CHUNK, size))
            ]
        )
    for start in range(0, size, 10 * _CHUNK):
        last = min(start + 10 * _CHUNK, size)
        direct.update_priorities({f"g{i}": 1.0 + i % _CLASSES for i in range(start, last)})
    ours.persist("everysec")
    return direct


def draw(direct: RedisTable, numbers: "itertools.count[int]") -> list[int]:
    """Return the sequence numbers of the groups of one draw."""
    request = SampleRequest(
        num_groups=_BATCH, learner_version=0, request_id=f"d{next(numbers)}", selector=Weighted(by="priority")
    )
    _, rest = direct.run_sample(request, "draw")
    return [int(member) for member in msgpack.unpackb(rest[0])[0]]


def frequencies(direct: RedisTable, numbers: "itertools.count[int]", *, num_draws: int) -> float:
    """Return how far the share of any class of equal weights is from its weight, relative, at worst."""
    drawn: Counter[int] = Counter()
    for _ in range(num_draws):
        drawn.update((number - 1) % _CLASSES for number in draw(direct, numbers))
    total_weight = sum(range(1, _CLASSES + 1))
    total = sum(drawn.values())
    return max(abs(drawn[i] / total / ((1 + i) / total_weight) - 1) for i in range(_CLASSES))
