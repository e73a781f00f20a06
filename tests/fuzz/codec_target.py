"""What the fuzzer runs: any bytes are a record or a named error, and a record that was read is written unchanged.

python -m tests.fuzz.codec_target NAME CORPUS_DIRECTORY -runs=N      NAME is one of TARGETS
"""

import json
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import atheris

with atheris.instrument_imports(include=["buffer"]):
    from buffer.codec import decode_group, encode_group, group_from_record
    from buffer.errors import InvalidRecord, InvalidRequest
    from buffer.wire import JSON, MSGPACK, Envelope, Heartbeat, LearnerReport, TimedSampleRequest, decode, encode, parse

import msgpack

LIMIT_BYTES = 1 << 20
_BODIES = (TimedSampleRequest, LearnerReport, Heartbeat)
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64 - 1, 0.0, -0.0, 1e-45, 1e39, float("nan"), float("inf")),
    *("", "g0", "\u0000", "x" * 200, b"", b"\x00" * 3, b"\xff" * 8, [], {}, [[]], [None] * 40, {"": 0}),
)


def stored_record(data: bytes) -> None:
    """Read a group as the table does. A group that was read has one form, which gives the same group again."""
    try:
        group = decode_group(data, max_bytes=LIMIT_BYTES)
    except InvalidRecord:
        return
    record = encode_group(group)
    assert encode_group(decode_group(record, max_bytes=len(record))) == record, "read back as another group"


def msgpack_body(data: bytes) -> None:
    """Read a body as the service does."""
    _body(data, MSGPACK)


def json_body(data: bytes) -> None:
    """Read a body as the service does."""
    _body(data, JSON)


def _body(data: bytes, media_type: str) -> None:
    try:
        value = decode(data, media_type)
    except (InvalidRecord, InvalidRequest):
        return
    for kind in _BODIES:
        try:
            body = parse(kind, value)
        except InvalidRequest:
            continue
        assert parse(kind, decode(encode(body, media_type), media_type)) == body, f"another {kind.__name__}"
    try:
        records = parse(Envelope[object], value).groups
    except InvalidRequest:
        return
    for record in records:
        try:
            group = group_from_record(record)
        except InvalidRecord:
            continue
        stored = encode_group(group)
        assert encode_group(decode_group(stored, max_bytes=len(stored))) == stored, "read back as another group"


class Target(NamedTuple):
    """What is fuzzed, and the encoding whose values the mutator changes."""

    read: Callable[[bytes], None]
    loads: Callable[[bytes], object]
    dumps: Callable[[object], bytes]


def _unpack(data: bytes) -> object:
    return msgpack.unpackb(data, strict_map_key=False)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()  # NaN and Infinity, which JSON has not, are among the odd values


TARGETS: Mapping[str, Target] = {
    "stored_record": Target(stored_record, _unpack, msgpack.packb),
    "msgpack_body": Target(msgpack_body, _unpack, msgpack.packb),
    "json_body": Target(json_body, json.loads, _json),
}


def mutate(target: Target, data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value inside a message, or bytes anywhere: blind changes seldom get past the first check."""
    rng = random.Random(seed)
    if rng.random() < 0.7:
        try:
            message = target.dumps(_changed(target.loads(data), rng))
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            pass  # not a message, or no longer one: fall back to bytes
        else:
            if len(message) <= max_size:
                return message
    mutated: bytes = atheris.Mutate(data, max_size)
    return mutated


def _changed(value: Any, rng: random.Random) -> Any:
    """Return the value with one change somewhere below it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        rest = {other: item for other, item in value.items() if other != name}
        if rng.random() < 0.1:
            return rest if rng.random() < 0.5 else rest | {str(rng.choice(_ODD)): value[name]}
        return value | {name: _changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place:] * 2 if rng.random() < 0.5 else value[:place] + value[place + 1 :]
        return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    if isinstance(value, bytes) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return value[:place] + bytes([rng.randrange(256)]) + value[place + rng.randrange(2) :]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1))
    return rng.choice(_ODD)


def main(name: str, *options: str) -> None:
    """Fuzz until the budget is spent (exit code 0) or something breaks."""
    target = TARGETS[name]
    atheris.Setup([sys.argv[0], *options], target.read, custom_mutator=partial(mutate, target))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
