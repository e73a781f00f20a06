"""The readers without pydantic take what is usual, and never take what pydantic refuses or reads otherwise."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings

from buffer.codec import encode_group, encoded_group_from_record, read_group
from buffer.errors import InvalidRecord
from buffer.quick import intact_group, valid_group
from buffer.types import Group, SamplingSettings, VersionSpan
from tests.factories import make_group, make_trajectory

CUT = SamplingSettings(temperature=0.5, top_p=0.9, top_k=0, min_p=0.0)
USUAL = make_group("usual", rewards=(1.0, 0.0, 0.5))
RICH = make_group(
    "rich",
    trajectories=[
        make_trajectory(
            "a",
            response_mask=[True, False, True, True],
            spans=[VersionSpan(start=0, end=3, version=None), VersionSpan(start=3, end=4, version=7)],
            sampling=CUT,
            kept_token_ids=[8, 4, 10, 2],
            kept_token_counts=[2, 0, 1, 1],
            token_rewards=[0.0, 1.0, 0.0, -1.0],
            episode_id="e",
            columns={"entropy": [0.5] * 4},
        ),
        make_trajectory("b"),
    ],
)
CHANGES: list[tuple[tuple[str | int, ...], object]] = [
    (("run_id",), "a b"),
    (("run_id",), "a\n"),
    (("split",), ["train"]),
    (("trajectories",), []),
    (("trajectories", 0, "trajectory_id"), "b"),
    (("trajectories", 0, "trajectory_id"), b"x"),
    (("trajectories", 0, "prompt_ids"), b""),
    (("trajectories", 0, "prompt_ids"), b"\0\0\0"),
    (("trajectories", 0, "response_ids"), np.asarray([8, -9, 10, 2], "<i4").tobytes()),
    (("trajectories", 0, "response_mask"), b"\1\2\1\1"),
    (("trajectories", 0, "response_mask"), b"\0\0\0\0"),
    (("trajectories", 0, "response_mask"), b"\1\1\1"),
    (("trajectories", 0, "behavior_logprobs"), np.asarray([-1, np.nan, -1, -1], "<f4").tobytes()),
    (("trajectories", 0, "behavior_logprobs"), np.asarray([-1, -np.inf, -1, -1], "<f4").tobytes()),
    (("trajectories", 0, "behavior_logprobs"), np.asarray([-1, 0.0, 0.25, -1], "<f4").tobytes()),
    (("trajectories", 0, "behavior_logprobs"), np.asarray([-1, -1, -1, -1], "<f4").tobytes()),
    (("trajectories", 0, "spans", 0, "start"), 1),
    (("trajectories", 0, "spans", 0, "end"), True),
    (("trajectories", 0, "spans", 0, "version"), -1),
    (("trajectories", 0, "spans", 0, "version"), 1 << 53),
    (("trajectories", 0, "spans", 1, "end"), 5),
    (("trajectories", 0, "sampling", "temperature"), 0.0),
    (("trajectories", 0, "sampling", "top_k"), True),
    (("trajectories", 0, "sampling", "top_p"), float("nan")),
    (("trajectories", 0, "reward"), float("inf")),
    (("trajectories", 0, "reward"), True),
    (("trajectories", 0, "finish_reason"), ["stop"]),
    (("trajectories", 0, "finish_reason"), "eos"),
    (("trajectories", 0, "episode_id"), ""),
    (("trajectories", 0, "token_rewards"), np.asarray([0, np.inf, 0, 0], "<f4").tobytes()),
    (("trajectories", 0, "kept_token_counts"), np.asarray([1, 1, 1, 1], "<i4").tobytes()),
    (("trajectories", 0, "kept_token_ids"), None),
    (("trajectories", 0, "distribution_logprobs"), np.zeros(4, "<f4").tobytes()),
    (("trajectories", 0, "columns"), {"entropy": b"\0" * 12}),
    (("trajectories", 0, "columns"), {"a b": b"\0" * 16}),
    (("trajectories", 0, "columns"), {"entropy": np.full(4, np.nan, "<f4").tobytes()}),
    (("trajectories", 0, "color"), "red"),
]


def record_of(group: Group) -> dict[str, Any]:
    record: dict[str, Any] = msgpack.unpackb(encode_group(group))["group"]
    return record


@pytest.mark.parametrize("group", [USUAL, RICH], ids=["usual", "rich"])
@pytest.mark.parametrize("read", [valid_group, intact_group])
def test_a_canonical_record_is_read_as_pydantic_reads_it(group: Group, read: Callable[[object], Group | None]) -> None:
    record = record_of(group)

    quick, slow = read(record), Group.model_validate(record)

    assert quick is not None
    assert encode_group(quick) == encode_group(slow) == encode_group(group)
    assert quick.model_dump_json() == slow.model_dump_json()
    assert quick.model_fields_set == slow.model_fields_set
    assert not quick.trajectories[0].response_ids.flags.writeable


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=[".".join(map(str, path)) for path, _ in CHANGES])
def test_what_pydantic_refuses_is_left_to_pydantic(path: tuple[Any, ...], value: object) -> None:
    record = copy.deepcopy(record_of(RICH))
    place: Any = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value

    with pytest.raises(ValueError, match="validation error"):
        Group.model_validate(record)
    assert valid_group(record) is None


def test_a_negative_zero_is_itself_although_the_settings_of_zero_are_remembered() -> None:
    record = record_of(USUAL)
    assert valid_group(record) is not None
    for trajectory in record["trajectories"]:
        trajectory["sampling"]["min_p"] = -0.0

    stored = encoded_group_from_record(record).record

    assert stored == encode_group(Group.model_validate(record))
    assert encode_group(read_group(stored)) == stored


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data(), group=st.sampled_from([USUAL, RICH]))
def test_flipped_bits_never_pass_unless_pydantic_reads_the_same(data: st.DataObject, group: Group) -> None:
    encoded = bytearray(encode_group(group))
    for position in data.draw(st.lists(st.integers(0, 8 * len(encoded) - 1), min_size=1, max_size=3, unique=True)):
        encoded[position // 8] ^= 1 << position % 8
    try:
        record = msgpack.unpackb(bytes(encoded))["group"]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException):
        return

    quick = valid_group(record)

    if quick is not None:
        canonical = encode_group(Group.model_validate(record))
        assert encode_group(quick) == encoded_group_from_record(record).record == canonical


def test_a_submitted_record_is_stored_as_the_canonical_one_whatever_the_order_of_its_fields() -> None:
    two_columns = make_group("two", trajectories=[make_trajectory("a", columns={"a": [0.5] * 4, "b": [1.0] * 4})])
    for group in (USUAL, RICH, two_columns):
        record = record_of(group)
        other_order = copy.deepcopy(record)
        for trajectory in other_order["trajectories"]:
            trajectory["columns"] = dict(reversed(trajectory["columns"].items()))
        for submitted in (record, other_order, dict(reversed(record.items()))):
            stored = encoded_group_from_record(submitted)

            assert stored.record == encode_group(group)
            assert encode_group(stored.group) == encode_group(group)


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_damaged_stored_record_is_a_named_error(cut: int) -> None:
    record = encode_group(USUAL)
    shorter = record.replace(b"response_mask\xc4\x04", b"response_mask\xc4\x03", 1)

    for damaged in (record[:-cut], shorter, b"", b"\x80"):
        with pytest.raises(InvalidRecord):
            read_group(damaged)
