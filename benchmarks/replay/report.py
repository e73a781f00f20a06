"""How a measurement is taken and shown: medians and percentiles of repeats, CPU of processes, Markdown tables."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Timing:
    """Wall times of the repeats of one operation."""

    times_s: Sequence[float]

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile in milliseconds."""
        ordered = sorted(self.times_s)
        return 1000 * ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]

    @property
    def p50_ms(self) -> float:
        """The median."""
        return self.percentile_ms(50)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile; of few repeats, nearly the worst."""
        return self.percentile_ms(99)


def timed(operation: Callable[[], object], *, repeats: int, limit_s: float) -> Timing:
    """Time an operation, once unmeasured, then up to `repeats` times within `limit_s`."""
    operation()
    times: list[float] = []
    end = time.perf_counter() + limit_s
    while len(times) < repeats and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    return Timing(times)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its descendants have used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S + sum(cpu_s(int(child)) for child in children)


def redis_cpu_s(client: redis.Redis) -> float:
    """Return the CPU seconds of Redis' main thread."""
    info: Any = client.info("cpu")
    return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(_shown(cell) for cell in row)} |", flush=True)


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "-" if cell is None else str(cell)
