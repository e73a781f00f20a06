"""The delta codec: any two sets of tensors come back bit for bit, and nothing else is ever believed."""

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.errors import CorruptWeights, StalewiseError, WrongBase
from buffer.weights import changes
from buffer.weights.changes import Packer, Unpacker, find_change
from buffer.weights.delta import MAGIC, Stream, read_header, write_delta
from buffer.weights.tensors import HostTensor, checksum
from tests.buffer.weights_sets import bits_of, mirror_of, neighbours, tensor
from tests.deltas import delta_between

Tensors = dict[str, HostTensor]


def delta(old: Tensors, new: Tensors, base_version: int = 0, version: int = 1) -> bytes:
    return b"".join(delta_between(old, new, base_version=base_version, version=version))


def sparse_pair(size: int = 100_000) -> tuple[Tensors, Tensors]:
    """A bf16 tensor and its next version, one value in a hundred one step away."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 1 << 16, size, np.uint16)
    after = before.copy()
    after[rng.random(size) < 0.01] += 1
    return {"w": tensor("w", "BF16", [size], before)}, {"w": tensor("w", "BF16", [size], after)}


@given(neighbours())
@settings(max_examples=150, deadline=None)
def test_any_two_sets_round_trip_bit_for_bit(pair: tuple[Tensors, Tensors]) -> None:
    old, new = pair
    mirror = mirror_of(old)

    mirror.apply([[delta(old, new)]], base_version=0, version=1)

    assert bits_of(mirror.tensors) == bits_of(new)
    assert mirror.version == 1
    assert mirror.checksum == checksum((tensor.spec, tensor.digest()) for tensor in new.values())


@given(neighbours())
@settings(max_examples=50, deadline=None)
def test_a_publisher_that_holds_one_copy_writes_the_same_delta(pair: tuple[Tensors, Tensors]) -> None:
    old, new = pair
    mirror = mirror_of(old)

    written = b"".join(write_delta(0, 1, mirror.advance(new.values(), 1)))

    assert written == delta(old, new)
    assert bits_of(mirror.tensors) == bits_of(new)


def test_a_tensor_of_several_blocks_with_a_change_on_each_side_of_every_border() -> None:
    size = 2 * changes.BLOCK_VALUES + 5
    before = np.zeros(size, np.uint8)
    after = before.copy()
    after[[0, changes.BLOCK_VALUES - 1, changes.BLOCK_VALUES, 2 * changes.BLOCK_VALUES - 1, size - 1]] = 1
    old, new = {"w": tensor("w", "U8", [size], before)}, {"w": tensor("w", "U8", [size], after)}
    mirror = mirror_of(old)

    mirror.apply([[delta(old, new)]], base_version=0, version=1)

    assert bits_of(mirror.tensors) == bits_of(new)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_step_leads_back_and_a_step_of_one_is_the_next_value(width: int) -> None:
    rng = np.random.default_rng(width)
    old = np.frombuffer(rng.bytes(20_000 * width), f"<u{width}")
    new = np.frombuffer(rng.bytes(20_000 * width), f"<u{width}")
    old, new = old[old != new], new[old != new]

    steps = changes.steps_between(old, new)

    np.testing.assert_array_equal(changes.stepped(old, steps), new)
    floats = np.array([1.0, -1.0, 1e-30, -3.5], np.float32)
    up, down = (np.nextafter(floats, np.float32(limit)).view("<u4") for limit in (np.inf, -np.inf))
    assert changes.steps_between(floats.view("<u4"), up).tolist() == [1, 1, 1, 1]
    assert changes.steps_between(floats.view("<u4"), down).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("density", "form"), [(0.0, changes.UNCHANGED), (0.01, changes.GAPS), (0.5, changes.MASK), (1.0, changes.RAW)]
)
def test_the_shortest_form_is_taken(density: float, form: int) -> None:
    """All values change to unrelated ones where raw must win; elsewhere by one step."""
    rng = np.random.default_rng(3)
    old = rng.integers(0, 1 << 16, 100_000, np.uint16)
    new = old.copy()
    changed = rng.random(len(old)) < density
    new[changed] += 1
    if form == changes.RAW:
        new = rng.integers(0, 1 << 16, len(old), np.uint16)

    record = Packer().pack(find_change(old, new))

    assert record[0] == form


@pytest.mark.parametrize(("dtype", "share"), [("u1", 0.01), ("u2", 0.01), ("u2", 0.08), ("u4", 0.08), ("u8", 0.12)])
def test_a_sparse_change_holds_the_old_values_and_at_most_a_bit_a_value_beside_them(dtype: str, share: float) -> None:
    rng = np.random.default_rng(3)
    old = rng.integers(0, 200, 100_003, dtype)  # not a whole number of words
    new = old.copy()
    changed = np.flatnonzero(rng.random(len(old)) < share)
    new[changed] += 1
    new[-1] ^= 1

    change = find_change(old, new)

    assert change is not None
    assert change.where is not None
    assert change.positions().tolist() == sorted({*changed.tolist(), len(old) - 1})
    assert change.old.tolist() == old[change.positions()].tolist()
    assert change.where.nbytes <= min(4 * len(change.old), len(old) // 8 + 1)


def test_changed_values_of_a_training_step_take_at_most_1_6_bytes() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, 1 << 20).astype(np.float32)
    moved = weights + 2e-7 * rng.normal(size=len(weights)).astype(np.float32)
    before, after = ((w.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for w in (weights, moved))
    old, new = ({"w": tensor("w", "BF16", [len(w)], w)} for w in (before, after))

    content = delta(old, new)

    changed = int((before != after).sum())
    assert 0.002 < changed / len(before) < 0.02
    assert len(content) / changed < 1.6


def test_a_delta_from_other_weights_is_refused_and_the_mirror_stays_good() -> None:
    old, new = sparse_pair()
    content = delta(old, new)
    flipped = old["w"].bits.copy()
    flipped[7] ^= 1
    for mirror, base_version, version in (
        (mirror_of(old, version=3), 3, 4),
        (mirror_of({"w": tensor("w", "BF16", [len(flipped)], flipped)}), 0, 1),
        (mirror_of({"w": tensor("w", "F16", [len(flipped)], flipped)}), 0, 1),
        (mirror_of({"v": tensor("v", "BF16", [len(flipped)], flipped)}), 0, 1),
    ):
        before = bits_of(mirror.tensors)

        with pytest.raises(WrongBase, match="the delta"):
            mirror.apply([[content]], base_version=base_version, version=version)

        assert (mirror.version, bits_of(mirror.tensors)) == (base_version, before)
    with pytest.raises(WrongBase, match="leads from version 1, the mirror holds 0"):
        mirror_of(old).apply([[content]], base_version=1, version=2)


def test_a_second_part_of_other_weights_leaves_the_first_unapplied() -> None:
    old = {name: tensor(name, "BF16", [4], [1, 2, 3, 4]) for name in "ab"}
    new = {name: tensor(name, "BF16", [4], [1, 2, 3, 5]) for name in "ab"}
    good = delta({"a": old["a"]}, {"a": new["a"]})
    wrong = delta({"b": new["b"]}, {"b": old["b"]})
    mirror = mirror_of(old)

    with pytest.raises(WrongBase):
        mirror.apply([[good], [wrong]], base_version=0, version=1)

    assert (mirror.version, bits_of(mirror.tensors)) == (0, bits_of(old))
    mirror.apply([[good], [delta({"b": old["b"]}, {"b": new["b"]})]], base_version=0, version=1)
    assert (mirror.version, bits_of(mirror.tensors)) == (1, bits_of(new))


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_truncated_delta_is_a_named_error_and_no_half_applied_version(cut: float) -> None:
    old, new = sparse_pair(5_000)
    content = delta(old, new)
    mirror = mirror_of(old)

    with pytest.raises(CorruptWeights):
        mirror.apply([[content[: int(cut * len(content))]]], base_version=0, version=1)

    assert mirror.version is None or bits_of(mirror.tensors) == bits_of(old)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), chunk=st.integers(1, 4000))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_is_a_named_error_and_never_another_model(place: float, bit: int, chunk: int) -> None:
    old, new = sparse_pair(5_000)
    content = bytearray(delta(old, new))
    content[int(place * len(content))] ^= 1 << bit
    mirror = mirror_of(old)

    try:
        mirror.apply(
            [[bytes(content[i : i + chunk]) for i in range(0, len(content), chunk)]], base_version=0, version=1
        )
    except (CorruptWeights, WrongBase):
        assert mirror.version is None or bits_of(mirror.tensors) == bits_of(old)
    else:  # a bit that means nothing, such as one of zstd's reserved ones
        assert bits_of(mirror.tensors) == bits_of(new)


def test_what_follows_the_end_is_refused() -> None:
    old, new = sparse_pair(100)

    with pytest.raises(CorruptWeights, match="goes on after its end"):
        mirror_of(old).apply([[delta(old, new), b"x"]], base_version=0, version=1)


def stream(plain: int, sent: bytes, packing: int = 1) -> bytes:
    return struct.pack("<BII", packing, plain, len(sent)) + sent


def bomb(claimed: int, real: int) -> bytes:
    """A zstd frame of `real` zeros that claims to hold `claimed` bytes, 8 of them in the field for the size."""
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(real)))
    parameters = zstandard.get_frame_parameters(bytes(frame))
    assert parameters.content_size == real
    assert frame[4] >> 6 == 2  # a size field of 4 bytes, after magic and descriptor (single segment)
    frame[5:9] = struct.pack("<I", claimed)
    return bytes(frame)


SIZE = 4_000
HOSTILE = {
    "unknown form": struct.pack("<BI", 9, 1),
    "no change in a changed block": struct.pack("<BI", changes.GAPS, 0),
    "more changes than values": struct.pack("<BI", changes.GAPS, SIZE + 1),
    "unchanged with changes": struct.pack("<BI", changes.UNCHANGED, 5),
    "stream longer than it can be": struct.pack("<BI", changes.GAPS, 5) + stream(1 << 30, b"x"),
    "sent more than plain": struct.pack("<BI", changes.GAPS, 5) + stream(5, b"x" * 9),
    "stored shorter than plain": struct.pack("<BI", changes.GAPS, 5) + stream(5, b"xxxx", 0),
    "unknown packing": struct.pack("<BI", changes.GAPS, 5) + stream(5, b"xxxxx", 7),
    "bomb that tells the truth": struct.pack("<BI", changes.RAW, SIZE) + stream(2 * SIZE, bomb(1 << 26, 1 << 26)),
    "bomb that lies low": struct.pack("<BI", changes.RAW, SIZE) + stream(2 * SIZE, bomb(2 * SIZE, 1 << 26)),
    "bomb that lies high": struct.pack("<BI", changes.RAW, SIZE) + stream(2 * SIZE, bomb(1 << 31, 1 << 26)),
    "no zstd frame": struct.pack("<BI", changes.RAW, SIZE) + stream(2 * SIZE, b"x" * 100),
    "gaps beyond the block": struct.pack("<BI", changes.GAPS, 2)
    + stream(17, b"\xff" * 15 + b"\xfe\xfe", 0)
    + stream(2, b"ab", 0) * 2,
    "gaps that do not end": struct.pack("<BI", changes.GAPS, 1) + stream(1, b"\xff", 0),
    "mask of another count": struct.pack("<BI", changes.MASK, 3) + stream(SIZE // 8, bytes(SIZE // 8), 0),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_record_is_a_named_error_within_bounded_memory(record: bytes) -> None:
    block = np.zeros(SIZE, np.uint16)
    unpacker = Unpacker()
    tracemalloc.start()

    with pytest.raises(CorruptWeights):
        unpacker.apply(Stream([record]).read, block)

    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "ends 8 bytes early"),
        (b"SAFETENS" + bytes(8), "a delta begins with"),
        (MAGIC + struct.pack("<I", 1 << 31), "2147483648 bytes, 16777216 are allowed"),
        (MAGIC + struct.pack("<I", 2) + b"{}", "header of a delta is malformed: base_version"),
        (MAGIC + struct.pack("<I", 2) + b"\xff{", "header of a delta is malformed"),
    ],
)
def test_a_hostile_header_is_a_named_error(content: bytes, sentence: str) -> None:
    with pytest.raises(StalewiseError, match=sentence):
        read_header(Stream([content]).read)


def test_a_hundred_chained_versions_stay_bit_exact() -> None:
    rng = np.random.default_rng(5)
    published = {"w": tensor("w", "BF16", [3000], rng.integers(0, 1 << 16, 3000, np.uint16))}
    learner, actor = mirror_of(published), mirror_of(published)
    for version in range(1, 101):
        values = learner.tensors["w"].bits.copy()
        values[rng.integers(0, 3000, 30)] += rng.integers(0, 3, 30, np.uint16)
        change = learner.advance([tensor("w", "BF16", [3000], values)], version)

        actor.apply([write_delta(version - 1, version, change)], base_version=version - 1, version=version)

        assert (actor.version, actor.checksum) == (version, learner.checksum)
        assert bits_of(actor.tensors) == {"w": values.tobytes()}
