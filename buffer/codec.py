"""Groups as bytes: one canonical msgpack form, and the one place where foreign bytes become records."""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgpack
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from buffer.errors import InvalidRecord, Oversize
from buffer.types import SCHEMA, Group, Part, Record, Trajectory

C = TypeVar("C", list[Any], dict[str, Any])
R = TypeVar("R", bound=Record)

MAX_LIST_ITEMS = 1 << 18
"""Longest list in a message; longer token arrays travel as raw bytes."""

MAX_MAP_ITEMS = 1 << 16

_BYTES_PER_CONTAINER = 16
"""The smallest container of a real record, a span, takes more; an empty list takes 1 byte here and 56 in memory."""

_SHOWN_CHARACTERS = 60


def encode_group(group: Group) -> bytes:
    """Return the canonical record: equal groups give equal bytes, whichever way they were submitted."""
    record = group.model_dump()
    for trajectory in record["trajectories"]:
        trajectory["columns"] = dict(sorted(trajectory["columns"].items()))
    packed: bytes = msgpack.packb({"schema": SCHEMA, "group": record})
    return packed


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """Return the canonical record of one trajectory, as it stands within that of its group."""
    record = trajectory.model_dump()
    record["columns"] = dict(sorted(record["columns"].items()))
    packed: bytes = msgpack.packb(record)
    return packed


def content_hash(group: Group) -> str:
    """Return blake2b-128 of the canonical record in hex: the identity of what a group says."""
    return record_hash(encode_group(group))


def record_hash(record: bytes) -> str:
    """Return the content hash of a group that is already encoded."""
    return hashlib.blake2b(record, digest_size=16).hexdigest()


def decode_group(data: bytes, *, max_bytes: int) -> Group:
    """Read one encoded group. Raises Oversize before decoding, InvalidRecord for everything that is not a group."""
    envelope = unpack(data, max_bytes=max_bytes)
    if not isinstance(envelope, dict) or set(envelope) != {"schema", "group"}:
        raise InvalidRecord("an encoded group is a map of `schema` and `group`")
    if envelope["schema"] != SCHEMA:
        raise InvalidRecord(f"the record has schema {_shown(envelope['schema'])}, this build reads {SCHEMA}")
    return group_from_record(envelope["group"])


def unpack(data: bytes, *, max_bytes: int) -> object:
    """Decode msgpack from an untrusted sender in memory proportional to its size.

    Raises Oversize before decoding, InvalidRecord when the bytes are not msgpack or break a limit.
    """
    if len(data) > max_bytes:
        raise Oversize(f"the message has {len(data)} bytes, the limit is {max_bytes}", hint="send fewer groups at once")
    budget = _ContainerBudget(16 + len(data) // _BYTES_PER_CONTAINER)
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


class _ContainerBudget:
    """Counts lists and maps, so that a small message cannot unfold into a large heap."""

    def __init__(self, containers: int) -> None:
        self._left = containers

    def spend(self, container: C) -> C:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more lists and maps than a record of this size can hold")
        return container


def group_from_record(record: object) -> Group:
    """Validate a decoded record. Raises InvalidRecord with one sentence: which field, what is wrong, the value seen."""
    return _validated(Group, record)


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
