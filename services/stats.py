"""The statistics of a service, put together from its collaborators: one truth for JSON, Prometheus and the history."""

import shutil
from pathlib import Path
from typing import Any

from buffer.redis_client import RedisClient, nodes_of, store_errors
from buffer.types import LimiterState
from buffer.wire import LimiterStatus, Limits, RunInfo, ServiceStats, StoreStatus
from services.context import ServiceContext


def store_status(client: RedisClient, directory: Path) -> StoreStatus:
    """Ask Redis for its memory and the system for the disk of `directory`. Raises StoreUnavailable.

    Of a cluster, the numbers are those of the node that is closest to its limit.
    """
    with store_errors():
        memories: list[Any] = [node.info("memory") for node in nodes_of(client).values()]
    memory = max(memories, key=lambda memory: memory["used_memory"] / (memory["maxmemory"] or float("inf")))
    disk = shutil.disk_usage(directory)
    return StoreStatus(
        memory_bytes=memory["used_memory"],
        memory_limit_bytes=memory["maxmemory"],
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
    )


def run_info(context: ServiceContext) -> RunInfo:
    """Return whom a caller is talking to."""
    latest = context.weights.latest()
    return RunInfo(
        run_id=context.run_id,
        model_fingerprint=latest.model_fingerprint if latest else None,
        latest_version=latest.version if latest else -1,
        limits=Limits(
            max_body_bytes=context.settings.max_body_bytes,
            max_group_bytes=context.table_settings.max_group_bytes,
            capacity_groups=context.table_settings.capacity_groups * context.table_settings.shards,
            capacity_bytes=context.table_settings.capacity_bytes * context.table_settings.shards,
        ),
        tokens_required=any(context.settings.tokens.by_role().values()),
    )


def service_stats(context: ServiceContext) -> ServiceStats:
    """Return everything a dashboard needs, in constant time."""
    table = context.table.stats()
    waiting = {wait.who for wait in table.waits}
    state = LimiterState.FLOWING
    if waiting:
        state = LimiterState.LEARNER_WAITS if "learner" in waiting else LimiterState.ACTORS_WAIT
    learner, actors = context.presence.read()
    return ServiceStats(
        run=run_info(context),
        table=table,
        limiter=LimiterStatus(state=state, settings=context.limiter_settings),
        weights=context.weights.status(),
        learner=learner,
        actors=actors,
        evaluations=context.evaluations.read(),
        store=context.store(),
        promises=dict(context.promises()),
        uptime_s=context.monotonic() - context.started_s,
    )
