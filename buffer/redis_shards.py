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


def claim_shards(client: RedisClient, num_shards: int, run_id: str) -> None:
    """Note how many shards a run has. Raises InvalidSettings when it was begun with another number, StoreUnavailable.

    With another number ids would belong to other shards: groups would be lost from view, and stored twice.
    """
    first = shard_prefix(run_id, 0)
    with store_errors():
        was_sharded: Any = client.exists(first + "stats") and not client.exists(first + "shards")
        client.set(first + "shards", 1 if was_sharded else num_shards, nx=True)
        begun_with: Any = client.get(first + "shards")
    if int(begun_with) != num_shards:
        raise InvalidSettings(
            f"table.shards={num_shards}, but run {run_id} was begun with {int(begun_with)}",
            hint="keep the number, or export the groups and import them into a new run",
        )
