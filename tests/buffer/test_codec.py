"""Groups as bytes: bit-exact there and back, one identity, and a named error for anything else."""

import json
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from buffer.codec import MAX_LIST_ITEMS, decode_group, encode_group, group_from_record, unpack
from buffer.errors import InvalidRecord, Oversize
from buffer.types import FinishReason, Group, SamplingSettings, Split, Trajectory, VersionSpan
from tests.factories import content_hash, make_group, make_trajectory

LIMIT_BYTES = 1 << 20
profile = settings(max_examples=60, deadline=None, derandomize=True, database=None)

identifiers = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,20}\Z")
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def trajectories(draw: st.DrawFn, trajectory_id: str) -> Trajectory:
    """Draw any trajectory: masked tokens, several versions, cut supports, optional columns."""
    length = draw(st.integers(1, 6))
    mask = draw(arrays(np.bool_, length).filter(np.any))
    logprobs = draw(arrays(np.float32, length, elements=st.floats(-(2.0**100), 0, width=32)))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=3)) | {length})
    versions = draw(st.lists(st.none() | st.integers(0, 2**53 - 1), min_size=len(cuts), max_size=len(cuts)))
    tokens = draw(arrays(np.int32, length, elements=st.integers(0, 2**31 - 1)))
    truncates = draw(st.booleans())
    any_column = arrays(np.float32, length, elements=floats32)
    return Trajectory(
        trajectory_id=trajectory_id,
        prompt_ids=draw(arrays(np.int32, st.integers(1, 5), elements=st.integers(0, 2**31 - 1))),
        response_ids=tokens,
        response_mask=mask,
        behavior_logprobs=np.where(mask, logprobs, np.float32(0)),
        spans=tuple(
            VersionSpan(start=start, end=end, version=version)
            for start, end, version in zip([0, *cuts], cuts, versions, strict=False)
        ),
        sampling=SamplingSettings(
            temperature=draw(st.floats(0.01, 10)), top_p=0.5 if truncates else 1.0, top_k=0, min_p=0.0
        ),
        reward=draw(st.floats(-1e18, 1e18)),
        finish_reason=draw(st.sampled_from(FinishReason)),
        token_rewards=draw(st.none() | arrays(np.float32, length, elements=floats32)),
        episode_id=draw(st.none() | identifiers),
        kept_token_ids=tokens[mask] if truncates else None,
        kept_token_counts=mask.astype(np.int32) if truncates else None,
        columns=draw(st.dictionaries(identifiers, any_column, max_size=3)),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    return make_group(
        draw(identifiers),
        run_id=draw(identifiers),
        prompt_id=draw(identifiers),
        split=draw(st.sampled_from(Split)),
        trajectories=[draw(trajectories(f"t{i}")) for i in range(draw(st.integers(1, 3)))],
    )


def assert_same_bits(left: object, right: object) -> None:
    """Compare records field by field, arrays by dtype and bytes (NaN payloads and -0 included)."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        assert (left.dtype, left.tobytes()) == (right.dtype, right.tobytes())
    elif isinstance(left, tuple) and isinstance(right, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_bits(one, other)
    elif isinstance(left, dict) and isinstance(right, dict):
        assert set(left) == set(right)
        for name in left:
            assert_same_bits(left[name], right[name])
    elif isinstance(left, Group | Trajectory) and isinstance(right, Group | Trajectory):
        assert_same_bits(dict(left), dict(right))
    else:
        assert left == right


@profile
@given(group=groups())
def test_msgpack_round_trip_is_bit_exact_and_deterministic(group: Group) -> None:
    data = encode_group(group)

    decoded = decode_group(data, max_bytes=LIMIT_BYTES)

    assert_same_bits(decoded, group)
    assert encode_group(decoded) == data


@profile
@given(group=groups())
def test_a_json_submission_has_the_same_content_hash(group: Group) -> None:
    text = json.dumps(group.model_dump(mode="json"), allow_nan=False)

    assert content_hash(group_from_record(json.loads(text))) == content_hash(group)


def test_content_hash_ignores_the_order_of_columns_and_sees_every_bit() -> None:
    one = make_group(trajectories=[make_trajectory(columns={"a": [0] * 4, "b": [1] * 4})])
    other = make_group(trajectories=[make_trajectory(columns={"b": [1] * 4, "a": [0] * 4})])
    changed = make_group(trajectories=[make_trajectory(columns={"b": [1] * 4, "a": [0, 0, 0, 1e-45]})])

    assert content_hash(one) == content_hash(other)
    assert content_hash(one) != content_hash(changed)
    assert len(content_hash(one)) == 32


def test_the_largest_records_that_are_accepted_can_be_read_back() -> None:
    length = 1 << 16
    spans = [VersionSpan(start=i, end=i + 1, version=0) for i in range(length)]
    longest = make_trajectory("t0", response_ids=[1] * length, behavior_logprobs=[0.0] * length, spans=spans)
    widest = [make_trajectory(f"t{i}", columns={f"c{j}": [0.0] * 4 for j in range(256)}) for i in range(3)]

    for trajectories in ([longest], widest, [make_trajectory(f"{i}", response_ids=[1]) for i in range(1000)]):
        group = make_group(trajectories=trajectories)
        assert encode_group(decode_group(encode_group(group), max_bytes=1 << 30)) == encode_group(group)


@profile
@given(data=st.data())
def test_truncated_bytes_are_a_named_error(data: st.DataObject) -> None:
    record = encode_group(make_group())
    length = data.draw(st.integers(0, len(record) - 1))

    with pytest.raises(InvalidRecord):
        decode_group(record[:length], max_bytes=LIMIT_BYTES)


@settings(profile, max_examples=300)
@given(data=st.data())
def test_flipped_bits_are_a_valid_group_or_a_named_error(data: st.DataObject) -> None:
    record = bytearray(encode_group(make_group(trajectories=[make_trajectory(columns={"entropy": [0.5] * 4})])))
    for position in data.draw(st.lists(st.integers(0, 8 * len(record) - 1), min_size=1, max_size=3, unique=True)):
        record[position // 8] ^= 1 << position % 8

    try:
        group = decode_group(bytes(record), max_bytes=LIMIT_BYTES)
    except InvalidRecord:
        return
    assert_same_bits(decode_group(encode_group(group), max_bytes=LIMIT_BYTES), group)


@settings(profile, max_examples=200)
@given(noise=st.binary(max_size=200))
def test_noise_is_a_named_error(noise: bytes) -> None:
    with pytest.raises(InvalidRecord):
        decode_group(noise, max_bytes=LIMIT_BYTES)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xdb\xff\xff\xff\xff", "incomplete input"),
        (b"\xc6\xff\xff\xff\xff", "incomplete input"),
        (b"\xc7\x08\x01" + b"x" * 8, "max_ext_len"),
        (b"\xdc\x10\x00" + b"\x90" * 4096, "more lists and maps than a record of this size can hold"),
        (b"\x91" * 600, "not a msgpack message"),
        (b"\xdd\x00\x0f\x42\x40" + b"\x00" * 1_000_000, f"exceeds max_array_len({MAX_LIST_ITEMS})"),
        (b"\xc1", "not a msgpack message"),
        (b"\xa1\xff", "utf-8"),
        (b"\x81\x01\x02", "strict_map_key"),
        (b"\x00\x00", "extra data"),
    ],
    ids=["list", "map", "text", "bytes", "extension", "many", "deep", "long", "reserved", "utf8", "key", "trailing"],
)
def test_hostile_msgpack_is_refused_before_it_costs_memory(message: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        unpack(message, max_bytes=LIMIT_BYTES)

    assert sentence in str(caught.value)


def test_too_many_bytes_are_refused_before_decoding() -> None:
    with pytest.raises(Oversize, match="has 11 bytes, the limit is 10"):
        unpack(b"\xc1" * 11, max_bytes=10)


@pytest.mark.parametrize(
    ("envelope", "sentence"),
    [
        ({"schema": 2, "group": {}}, "the record has schema 2, this build reads 1"),
        ({"schema": "1", "group": {}}, "the record has schema '1', this build reads 1"),
        ({"group": {}}, "an encoded group is a map of `schema` and `group`"),
        ([1], "an encoded group is a map of `schema` and `group`"),
        ({"schema": 1, "group": [1]}, "input should be a valid dictionary or instance of Group, got list of 1 items"),
    ],
)
def test_envelope_of_another_kind_is_refused(envelope: Any, sentence: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        decode_group(msgpack.packb(envelope), max_bytes=LIMIT_BYTES)

    assert caught.value.detail == sentence
