"""Groups that arrive one trajectory at a time: how parts become a group, and those that MemoryTable holds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgpack

from buffer.codec import encode_trajectory, group_from_record, unpack
from buffer.outcomes import Facts
from buffer.table import TableSettings
from buffer.types import SCHEMA, Group, InsertOutcome, Part, PartResult

LONGEST_LIST_HEADER_BYTES = 5
"""What msgpack takes at most to say how many trajectories follow."""


def fields_of(part: Part) -> str:
    """Return what all parts of a group must agree about, as one text."""
    return json.dumps([part.prompt_id, part.split, part.group_size])


def group_of(run_id: str, group_id: str, fields: str, records: Iterable[bytes]) -> Group:
    """Return the group of these encoded trajectories, in the order of their ids, whatever order they arrived in."""
    prompt_id, split, _ = json.loads(fields)
    trajectories = [unpack(record, max_bytes=len(record)) for record in records]
    record = {"run_id": run_id, "group_id": group_id, "prompt_id": prompt_id, "split": split}
    group = group_from_record(record | {"trajectories": trajectories})
    ordered = sorted(group.trajectories, key=lambda trajectory: trajectory.trajectory_id)
    return group.model_copy(update={"trajectories": tuple(ordered)})


def envelope_bytes(part: Part) -> int:
    """Return what the encoded group takes beside its trajectories, at most."""
    fields = {"run_id": part.run_id, "group_id": part.group_id, "prompt_id": part.prompt_id, "split": part.split.value}
    packed: bytes = msgpack.packb({"schema": SCHEMA, "group": fields | {"trajectories": []}})
    return len(packed) - 1 + LONGEST_LIST_HEADER_BYTES


def limit_bytes(settings: TableSettings) -> int:
    """Return the largest encoded group that can be assembled and then stored."""
    return min(settings.max_group_bytes, settings.capacity_bytes, settings.partial_max_bytes)


def judge_late(part: Part, stored: Group | None) -> str:
    """Return the code of a part whose group is no longer partial; `stored` is the group if it is in the table."""
    for trajectory in stored.trajectories if stored else ():
        if trajectory.trajectory_id == part.trajectory.trajectory_id:
            same = encode_trajectory(trajectory) == encode_trajectory(part.trajectory)
            return "held" if same else "trajectory"
    return "closed"


def part_result(part: Part, outcome: InsertOutcome, reason: str) -> PartResult:
    """Return the outcome of a part."""
    return PartResult(
        group_id=part.group_id, trajectory_id=part.trajectory.trajectory_id, outcome=outcome, reason=reason
    )


@dataclass(slots=True)
class _Partial:
    fields: str
    run_id: str
    opened_s: float
    records: dict[str, bytes] = field(default_factory=dict)
    """Encoded trajectories by trajectory_id."""
    size_bytes: int = 0
    sealed_s: float | None = None
    """When it took its last trajectory, or its last insert was refused; None while it is open."""


class PartialGroups:
    """The partial groups of a MemoryTable, which calls every method under its lock.

    Life of one: open, with the first part; sealed, when complete or overdue; dropped, when inserted or refused.
    """

    def __init__(self, settings: TableSettings) -> None:
        self._settings = settings
        self._partials: dict[str, _Partial] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._partials)

    def is_sealed(self, group_id: str) -> bool:
        """Whether a group takes no more parts and waits to be inserted."""
        partial = self._partials.get(group_id)
        return partial is not None and partial.sealed_s is not None

    def answered(self, part: Part, record: bytes) -> tuple[str, Facts] | None:
        """Return what the group that a part belongs to answers as it is; None when it takes the part."""
        partial = self._partials.get(part.group_id)
        if partial is None:
            return None
        if partial.fields != fields_of(part):
            return "group_fields", ()
        held = partial.records.get(part.trajectory.trajectory_id)
        if held is not None:
            return ("held" if held == record else "trajectory"), ()
        return ("closed", ()) if partial.sealed_s is not None else None

    def hold(self, part: Part, record: bytes, now_s: float) -> tuple[str, Facts]:
        """Take a part, and seal its group when it is complete; or return why there is no room."""
        partial = self._partials.get(part.group_id) or _Partial(fields_of(part), part.run_id, now_s)
        group_bytes = envelope_bytes(part) + partial.size_bytes + len(record)
        if group_bytes > (limit := limit_bytes(self._settings)):
            return "bytes", (group_bytes, limit)
        num_groups = len(self._partials | {part.group_id: partial})
        too_many = num_groups > self._settings.partial_max_groups
        if too_many or self.size_bytes + len(record) > self._settings.partial_max_bytes:
            return "partials", (len(self._partials), self.size_bytes)
        self._partials[part.group_id] = partial
        partial.records[part.trajectory.trajectory_id] = record
        partial.size_bytes += len(record)
        self.size_bytes += len(record)
        if len(partial.records) == part.group_size:
            partial.sealed_s = now_s
        return "pending", (len(partial.records), part.group_size)

    def close_overdue(self, now_s: float) -> list[str]:
        """Seal the overdue groups that are large enough; drop the others and return their ids."""
        opened_until_s = now_s - self._settings.partial_group_timeout_s
        dropped = []
        for group_id, partial in list(self._partials.items()):
            if partial.sealed_s is None and partial.opened_s <= opened_until_s:
                if len(partial.records) >= self._settings.min_group_size:
                    partial.sealed_s = now_s
                else:
                    self.drop(group_id)
                    dropped.append(group_id)
        return sorted(dropped)

    def sealed(self) -> list[str]:
        """Return the sealed groups, the one that has waited longest for its insert first."""
        waiting = [
            (partial.sealed_s, group_id) for group_id, partial in self._partials.items() if partial.sealed_s is not None
        ]
        return [group_id for _, group_id in sorted(waiting)]

    def group(self, group_id: str) -> Group:
        """Return a sealed group as it is to be inserted."""
        partial = self._partials[group_id]
        return group_of(partial.run_id, group_id, partial.fields, partial.records.values())

    def refused_again(self, group_id: str, now_s: float) -> None:
        """Put a sealed group behind the others that wait."""
        self._partials[group_id].sealed_s = now_s

    def drop(self, group_id: str) -> None:
        """Forget a group."""
        self.size_bytes -= self._partials.pop(group_id).size_bytes
