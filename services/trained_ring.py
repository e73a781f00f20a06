"""The last trained groups with their ratios, shared by all API workers and bounded in number and bytes."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Protocol

from buffer.errors import NotFound
from buffer.redis_client import RedisClient, store_errors
from buffer.trained import MAX_TRAINED_GROUPS, TrainedGroup, TrainedSummary
from buffer.wire import MSGPACK, decode, encode

MAX_BYTES = 32 << 20
"""Encoded groups at most; 256 groups of 8 responses of 1,000 tokens have 27 MB."""


class TrainedRing(Protocol):
    """Remembers the newest MAX_TRAINED_GROUPS groups, at most MAX_BYTES of them; a group trained anew moves up."""

    def push(self, groups: Sequence[TrainedGroup]) -> None:
        """Remember groups, the last one as the newest."""
        ...

    def summaries(self) -> list[TrainedSummary]:
        """Return what is remembered, newest first."""
        ...

    def get(self, group_id: str) -> TrainedGroup:
        """Return one group. Raises NotFound."""
        ...


class MemoryTrainedRing:
    """A TrainedRing of one process."""

    def __init__(self) -> None:
        self._groups: dict[str, TrainedGroup] = {}

    def push(self, groups: Sequence[TrainedGroup]) -> None:
        """See TrainedRing."""
        for group in groups:
            self._groups.pop(group.group_id, None)
            self._groups[group.group_id] = group
        while len(self._groups) > MAX_TRAINED_GROUPS or self._num_bytes() > MAX_BYTES:
            del self._groups[next(iter(self._groups))]

    def summaries(self) -> list[TrainedSummary]:
        """See TrainedRing."""
        return [group.summary() for group in reversed(self._groups.values())]

    def get(self, group_id: str) -> TrainedGroup:
        """See TrainedRing."""
        if group_id not in self._groups:
            raise _unknown(group_id)
        return self._groups[group_id]

    def _num_bytes(self) -> int:
        return sum(len(encode(group, MSGPACK)) for group in self._groups.values())


class RedisTrainedRing:
    """A TrainedRing in Redis; the header of lua/keep_trained.lua is the schema of the keys below `prefix`."""

    def __init__(self, client: RedisClient, *, prefix: str) -> None:
        self._redis = client
        self._order, self._bodies, self._summaries = f"{prefix}order", f"{prefix}bodies", f"{prefix}summaries"
        self._keep = client.register_script((files("services") / "lua" / "keep_trained.lua").read_text())
        self._keys = [self._order, self._bodies, self._summaries, f"{prefix}counts"]

    def push(self, groups: Sequence[TrainedGroup]) -> None:
        """See TrainedRing. Raises StoreUnavailable."""
        entries: list[str | bytes | int] = []
        for group in groups:
            entries += [group.group_id, encode(group, MSGPACK), group.summary().model_dump_json()]
        with store_errors():
            self._keep(keys=self._keys, args=[MAX_TRAINED_GROUPS, MAX_BYTES, *entries])

    def summaries(self) -> list[TrainedSummary]:
        """See TrainedRing. Raises StoreUnavailable."""
        with store_errors():
            ids: Any = self._redis.zrange(self._order, 0, -1, desc=True)
            found: Any = self._redis.hmget(self._summaries, ids) if ids else []
        return [TrainedSummary.model_validate_json(summary) for summary in found if summary is not None]

    def get(self, group_id: str) -> TrainedGroup:
        """See TrainedRing. Raises StoreUnavailable."""
        with store_errors():
            body: Any = self._redis.hget(self._bodies, group_id)
        if body is None:
            raise _unknown(group_id)
        return TrainedGroup.model_validate(decode(body, MSGPACK))


def _unknown(group_id: str) -> NotFound:
    return NotFound(
        f"group {group_id} is not among the last trained groups",
        hint=f"the newest {MAX_TRAINED_GROUPS} are remembered, fewer when they are large",
    )
