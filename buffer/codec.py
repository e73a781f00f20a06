"""Groups as bytes: one canonical msgpack form, and the one place where foreign bytes become records."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy.typing as npt
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from buffer.errors import InvalidRecord, Oversize
from buffer.quick import intact_group, valid_group
from buffer.types import SCHEMA, Group, Part, Record, Trajectory

C = TypeVar("C", list[Any], dict[str, Any])
R = TypeVar("R", bound=Record)

MAX_LIST_ITEMS = 1 << 18
"""Longest list in a message; longer token arrays travel as raw bytes."""

MAX_MAP_ITEMS = 1 << 16

_BYTES_PER_CONTAINER = 16
"""The smallest container of a real record, a span, takes more; an empty list takes 1 byte here and 56 in memory."""

TOO_MANY_CONTAINERS = "more lists and maps than a record of this size can hold"

_SHOWN_CHARACTERS = 60


_GROUP_PREFIX: bytes = msgpack.packb({"schema": SCHEMA, "group": None})[:-1]


def encode_group(group: Group) -> bytes:
    """Return the canonical record: equal groups give equal bytes, whichever way they were submitted."""
    record = {
        "run_id": group.run_id,
        "group_id": group.group_id,
        "prompt_id": group.prompt_id,
        "split": group.split,
        "trajectories": [_trajectory_record(trajectory) for trajectory in group.trajectories],
    }
    packed: bytes = msgpack.packb({"schema": SCHEMA, "group": record})
    return packed


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """Return the canonical record of one trajectory, as it stands within that of its group."""
    packed: bytes = msgpack.packb(_trajectory_record(trajectory))
    return packed


def _trajectory_record(trajectory: Trajectory) -> dict[str, object]:
    """Return what `model_dump` does, in the order of the fields, with columns in the order of their names."""
    sampling = trajectory.sampling
    return {
        "trajectory_id": trajectory.trajectory_id,
        "prompt_ids": trajectory.prompt_ids.data,
        "response_ids": trajectory.response_ids.data,
        "response_mask": trajectory.response_mask.data,
        "behavior_logprobs": trajectory.behavior_logprobs.data,
        "spans": [{"start": span.start, "end": span.end, "version": span.version} for span in trajectory.spans],
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        },
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason,
        "token_rewards": _bytes_of(trajectory.token_rewards),
        "episode_id": trajectory.episode_id,
        "kept_token_ids": _bytes_of(trajectory.kept_token_ids),
        "kept_token_counts": _bytes_of(trajectory.kept_token_counts),
        "distribution_logprobs": _bytes_of(trajectory.distribution_logprobs),
        "columns": {name: column.data for name, column in sorted(trajectory.columns.items())},
    }


def _bytes_of(array: npt.NDArray[Any] | None) -> memoryview | None:
    return None if array is None else array.data


class EncodedGroup(NamedTuple):
    """A group and its canonical record."""

    group: Group
    record: bytes


def encoded(group: Group) -> EncodedGroup:
    """Return a group with its canonical record."""
    return EncodedGroup(group, encode_group(group))


def record_hash(record: bytes) -> str:
    """Return the first 128 bits of the SHA-256 of a canonical record in hex: the identity of what a group says."""
    return hashlib.sha256(record).hexdigest()[:32]


def decode_group(data: bytes, *, max_bytes: int) -> Group:
    """Read one encoded group. Raises Oversize before decoding, InvalidRecord for everything that is not a group."""
    return group_from_record(_record_in(unpack(data, max_bytes=max_bytes)))


def read_group(data: bytes) -> Group:
    """Read a group that a table validated and encoded, without validating it again. Raises InvalidRecord if damaged."""
    try:
        envelope: object = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise InvalidRecord(f"not a msgpack message: {error or type(error).__name__}") from error
    return intact_group_from_record(_record_in(envelope))


def _record_in(envelope: object) -> object:
    if not isinstance(envelope, dict) or set(envelope) != {"schema", "group"}:
        raise InvalidRecord("an encoded group is a map of `schema` and `group`")
    if envelope["schema"] != SCHEMA:
        raise InvalidRecord(f"the record has schema {_shown(envelope['schema'])}, this build reads {SCHEMA}")
    return envelope["group"]


def bare_record(data: bytes) -> memoryview:
    """Return the bytes of the group alone, as it stands in an answer, of one that `encode_group` encoded."""
    return memoryview(data)[len(_GROUP_PREFIX) :]


def unpack(data: bytes, *, max_bytes: int) -> object:
    """Decode msgpack from an untrusted sender in memory proportional to its size.

    Raises Oversize before decoding, InvalidRecord when the bytes are not msgpack or break a limit.
    """
    if len(data) > max_bytes:
        raise Oversize(f"the message has {len(data)} bytes, the limit is {max_bytes}", hint="send fewer groups at once")
    budget = _ContainerBudget(most_containers(len(data)))
    try:
        value: object = msgpack.unpackb(
            data,
            max_array_len=min(len(data), MAX_LIST_ITEMS),
            max_map_len=min(len(data), MAX_MAP_ITEMS),
            max_ext_len=0,
            list_hook=budget.spend,
            object_hook=budget.spend,
        )
    except (ValueError, msgpack.UnpackException) as error:  # truncated, trailing, nested too deep, over a limit
        raise InvalidRecord(f"not a msgpack message: {error or type(error).__name__}") from error
    return value


def most_containers(num_bytes: int) -> int:
    """Return how many lists and maps a message of a size may hold: more than any real record does."""
    return 16 + num_bytes // _BYTES_PER_CONTAINER


class _ContainerBudget:
    """Counts lists and maps, so that a small message cannot unfold into a large heap."""

    def __init__(self, containers: int) -> None:
        self._left = containers

    def spend(self, container: C) -> C:
        self._left -= 1
        if self._left < 0:
            raise ValueError(TOO_MANY_CONTAINERS)
        return container


def group_from_record(record: object) -> Group:
    """Validate a decoded record. Raises InvalidRecord with one sentence: which field, what is wrong, the value seen."""
    return valid_group(record) or _validated(Group, record)


def encoded_group_from_record(record: object) -> EncodedGroup:
    """Validate a decoded record and encode the group anew. Raises InvalidRecord, as `group_from_record` does."""
    group = valid_group(record)
    if group is None:
        return encoded(_validated(Group, record))
    if any(len(trajectory.columns) > 1 for trajectory in group.trajectories):
        return encoded(group)  # the columns may be in another order than that of their names
    # what valid_group takes has the fields and types of the canonical record: packed again, it is that record
    return EncodedGroup(group, msgpack.packb({"schema": SCHEMA, "group": record}))


def intact_group_from_record(record: object) -> Group:
    """Read a decoded record that a table validated before. Raises InvalidRecord if it is damaged."""
    return intact_group(record) or _validated(Group, record)


def part_from_record(record: object) -> Part:
    """Validate a decoded record, as `group_from_record` does."""
    return _validated(Part, record)


def _validated(kind: type[R], record: object) -> R:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        missing = any(_lacks_logprobs(fault) for fault in error.errors(include_url=False, include_context=False))
        hint = _WHY_LOGPROBS if missing else ""
        raise InvalidRecord(sentence(record, error), hint=hint) from error


_WHY_LOGPROBS = (
    "the ratio to the policy that drew a token cannot be known without its log-prob, and a missing one is not a ratio "
    "of 1: record the log-probs that the sampler reports"
)


def _lacks_logprobs(fault: ErrorDetails) -> bool:
    return fault["loc"][-1:] == ("behavior_logprobs",) and (fault["type"] == "missing" or fault["input"] is None)


def sentence(record: object, error: ValidationError) -> str:
    """Return the first fault of a record in one sentence that names the field and shows the value."""
    errors = _faults(error)
    first = errors[0]
    message = first["msg"].removeprefix("Value error, ")
    path = ".".join(str(step) for step in first["loc"])
    message = message[0].lower() + message[1:]
    sentence = f"{path}: {message}" if path else message
    if first["type"] != "missing" and not isinstance(first["input"], Mapping):
        sentence += f", got {_shown(first['input'])}"
    if len(errors) > 1:
        sentence += f" (and {len(errors) - 1} more)"
    if isinstance(record, Mapping) and isinstance(record.get("group_id"), str):
        return f"group {_shown(record['group_id'])}: {sentence}"
    return sentence


def _faults(error: ValidationError) -> list[ErrorDetails]:
    """Return the faults of a record, but not that a list is too short because its own items are faulty."""
    errors = error.errors(include_url=False, include_context=False)
    holders = {fault["loc"][:depth] for fault in errors for depth in range(len(fault["loc"]))}
    return [fault for fault in errors if fault["type"] != "too_short" or fault["loc"] not in holders]


def _shown(value: object) -> str:
    """Return a value as a message may show it: short, whatever was sent."""
    if isinstance(value, bytes | list | tuple | dict):
        unit = "bytes" if isinstance(value, bytes) else "items"
        return f"{type(value).__name__} of {len(value)} {unit}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
