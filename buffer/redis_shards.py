"""The table of a run on Redis, with as many shards as its settings say, on one server or on a cluster."""

from typing import Any

from buffer.errors import InvalidSettings
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import RedisClient, store_errors
from buffer.redis_scripts import shard_prefix
from buffer.redis_table import RedisTable
from buffer.sharded_table import ShardedTable
from buffer.table import ServedTable, TableSettings


def open_table(client: RedisClient, settings: TableSettings, limiter: RateLimiterSettings, run_id: str) -> ServedTable:
    """Return the table of a run; any number of processes may have it open."""
    shards = [RedisTable(client, settings, limiter, run_id, shard=shard) for shard in range(settings.shards)]
    return shards[0] if len(shards) == 1 else ShardedTable(shards, settings, limiter)


def claim_layout(client: RedisClient, settings: TableSettings, run_id: str) -> None:
    """Note what a run's stored groups are laid out by: the number of shards, and the weighting.

    With another number of shards ids would belong to other shards: groups would be lost from view, and stored twice.
    With another weighting the stored weights would be read in the wrong unit, or be missing; while no train group is
    stored it may change. Raises InvalidSettings when groups are stored by another layout, StoreUnavailable.
    """
    with store_errors():
        _claim_shards(client, settings.shards, run_id)
        _claim_weighting(client, settings, run_id)


def _claim_shards(client: RedisClient, num_shards: int, run_id: str) -> None:
    first = shard_prefix(run_id, 0)
    was_sharded: Any = client.exists(first + "stats") and not client.exists(first + "shards")
    client.set(first + "shards", 1 if was_sharded else num_shards, nx=True)
    begun_with: Any = client.get(first + "shards")
    if int(begun_with) != num_shards:
        raise InvalidSettings(
            f"table.shards={num_shards}, but run {run_id} was begun with {int(begun_with)}",
            hint="keep the number, or export the groups and import them into a new run",
        )


def _claim_weighting(client: RedisClient, settings: TableSettings, run_id: str) -> None:
    wanted = settings.weighting.model_dump_json() if settings.weighting else "none"
    note = shard_prefix(run_id, 0) + "weighting"
    client.set(note, wanted, nx=True)  # a run that was begun by an earlier build has no note: it is taken as it is
    noted: Any = client.get(note)
    if noted.decode() == wanted:
        return
    prefixes = [shard_prefix(run_id, shard) for shard in range(settings.shards)]
    if any(client.zcard(prefix + "train") for prefix in prefixes):
        raise InvalidSettings(
            f"table.weighting={wanted}, but the stored groups of run {run_id} have weights by {noted.decode()}",
            hint="keep the weighting, or export the groups and import them into a new run",
        )
    for prefix in prefixes:
        client.delete(*(prefix + index for index in ("weighted", "weighted_old", "weighted_line", "resting")))
    client.set(note, wanted)
