"""What a table may take of Redis' memory at most, and whether the live servers give it that much."""

import logging
from collections import Counter
from typing import Any

from buffer.errors import InvalidSettings
from buffer.redis_client import RedisClient, nodes_of, store_errors
from buffer.redis_scripts import shard_prefix
from buffer.table import TableSettings

log = logging.getLogger(__name__)

_BODY_SHARE = 1.25
"""Bytes that an allocator takes for a byte of a large value at worst; 1.1 on average with jemalloc, less with libc."""
_GROUP_BYTES, _ID_BYTES, _PROMPT_BYTES = 2_500, 500, 800
"""Indexes of a stored group, a remembered id, statistics of a prompt: measured with ids of 120 characters, weighted by
difficulty, and a fourth on top (docs/durability.md); half of that with ids of 30."""
AT_WORK_BYTES = 256 << 20
"""Redis itself, remembered draws (30 bytes a drawn group), and requests being answered: up to 4 MB of groups on their
way in, or 8 MB on their way out, each."""


def most_memory_bytes(settings: TableSettings, num_shards: int) -> int:
    """Return what so many shards take of the memory of one Redis at most, were every limit reached."""
    indexes = settings.capacity_groups * _GROUP_BYTES
    indexes += settings.dedup_max_ids * _ID_BYTES + settings.max_prompts * _PROMPT_BYTES
    return num_shards * (int(_BODY_SHARE * _body_bytes(settings)) + indexes) + AT_WORK_BYTES


def check_memory(client: RedisClient, settings: TableSettings, run_id: str) -> None:
    """Warn where a live server's maxmemory is less than this run may take of it; of a cluster, on each node.

    Raises InvalidSettings where not even the groups fit, since inserts would then be refused before capacity evicts
    anything; StoreUnavailable when a server does not answer.
    """
    with store_errors():
        for address, num_shards in _shards_by_node(client, settings, run_id).items():
            memory: Any = nodes_of(client)[address].info("memory")
            limit_bytes = int(memory["maxmemory"])
            body_bytes, most_bytes = num_shards * _body_bytes(settings), most_memory_bytes(settings, num_shards)
            if 0 < limit_bytes < body_bytes:
                raise InvalidSettings(
                    f"{address} has maxmemory={limit_bytes}, but the groups of this run may take {body_bytes} bytes "
                    "(table.capacity_bytes + repeat_max_bytes + partial_max_bytes, of each shard): inserts would be "
                    "refused before the table is full",
                    hint=f"raise maxmemory to {most_bytes}, or lower table.capacity_bytes",
                )
            if 0 < limit_bytes < most_bytes:
                log.warning(
                    "%s has maxmemory=%d, but this run may take %d bytes: inserts may be refused before the table is "
                    "full; raise it, or lower table.capacity_bytes, capacity_groups, dedup_max_ids or max_prompts",
                    *(address, limit_bytes, most_bytes),
                )


def _body_bytes(settings: TableSettings) -> int:
    return settings.capacity_bytes + settings.repeat_max_bytes + settings.partial_max_bytes


def _shards_by_node(client: RedisClient, settings: TableSettings, run_id: str) -> Counter[str]:
    """Return how many shards lie on each server, by the addresses of nodes_of."""
    nodes = nodes_of(client)
    if len(nodes) == 1:
        return Counter({next(iter(nodes)): settings.shards})
    cluster: Any = client  # redis-py has no types for it
    return Counter(cluster.get_node_from_key(shard_prefix(run_id, shard)).name for shard in range(settings.shards))
