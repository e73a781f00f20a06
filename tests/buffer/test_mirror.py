"""The host mirror: keyframes in, keyframes out, and files that are none."""

import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from buffer.errors import CorruptWeights
from buffer.weights.mirror import Mirror
from tests.buffer.weights_sets import bits_of, mirror_of, tensor
from tests.deltas import delta_between

TENSORS = {
    "scalar": tensor("scalar", "F32", (), [0x7FC00001]),
    "empty": tensor("empty", "F16", (3, 0), []),
    "bytes": tensor("bytes", "U8", (3,), [1, 2, 255]),
    "weight": tensor("weight", "BF16", (2, 3), [0, 0x8000, 0x7F80, 1, 2, 3]),
}


def test_a_keyframe_is_a_safetensors_file_that_maps_back_to_the_same_mirror(tmp_path: Path) -> None:
    mirror = mirror_of(TENSORS, version=7)
    path = tmp_path / "keyframe.safetensors"

    path.write_bytes(b"".join(mirror.keyframe()))

    again = Mirror.open(path, 7)
    assert bits_of(again.tensors) == bits_of(TENSORS)
    assert (again.version, again.checksum, again.num_bytes) == (7, mirror.checksum, path.stat().st_size)
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != "weight"}  # noqa: SIM118
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items()} == {
        "scalar": ("<f4", ()),
        "empty": ("<f2", (3, 0)),
        "bytes": ("|u1", (3,)),
    }


def test_a_mapped_file_follows_the_deltas(tmp_path: Path) -> None:
    path = tmp_path / "mirror.safetensors"
    path.write_bytes(b"".join(mirror_of(TENSORS).keyframe()))
    new = TENSORS | {"weight": tensor("weight", "BF16", (2, 3), [0, 0, 0x7F80, 1, 2, 4])}
    mirror = Mirror.open(path, 0)

    mirror.apply([delta_between(TENSORS, new, base_version=0, version=1)], base_version=0, version=1)

    assert bits_of(Mirror.open(path, 1).tensors) == bits_of(new)


def test_the_checksum_tells_every_change_apart() -> None:
    sets = [
        TENSORS,
        TENSORS | {"bytes": tensor("bytes", "U8", (3,), [1, 2, 254])},
        TENSORS | {"bytes": tensor("bytes", "I8", (3,), [1, 2, 255])},
        TENSORS | {"bytes": tensor("bytes", "U8", (3, 1), [1, 2, 255])},
        {name: TENSORS[name] for name in ("scalar", "weight")},
    ]

    assert len({mirror_of(tensors).checksum for tensors in sets}) == len(sets)
    assert mirror_of(dict(reversed(TENSORS.items()))).checksum == mirror_of(TENSORS).checksum


def file_of(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def entry(*offsets: object, dtype: str = "U8", shape: object = (4,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "0 bytes is no safetensors file"),
        (b"1234567", "7 bytes is no safetensors file"),
        (file_of({}, claimed=1 << 60), "claims 1152921504606846976 bytes of 10"),
        (file_of(b"not json"), "malformed"),
        (file_of([]), "malformed"),
        (file_of(b"[" * 100_000), "malformed"),
        (file_of({"w": []}, bytes(4)), "malformed"),
        (file_of({"w": entry(0)}, bytes(4)), "malformed"),
        (file_of({"w": entry(0.0, 4.0)}, bytes(4)), "malformed"),
        (file_of({"w": entry(0, 4, dtype="Q4")}, bytes(4)), "malformed"),
        (file_of({"w": entry(0, 4, shape="4")}, bytes(4)), "malformed"),
        (file_of({"w": entry(0, 4, shape=[-1])}, bytes(4)), "malformed"),
        (file_of({"w": entry(0, 1 << 50, shape=[1 << 40, 1 << 10])}, bytes(4)), "end at byte"),
        (file_of({"w": entry(0, 4), "v": entry(2, 6)}, bytes(6)), "tensor v of a keyframe lies at"),
        (file_of({"w": entry(0, 3)}, bytes(3)), "tensor w of a keyframe lies at"),
        (file_of({"w": entry(-4, 0)}, bytes(4)), "tensor w of a keyframe lies at"),
        (file_of({"w": entry(0, 4)}, bytes(5)), "end at byte"),
    ],
)
def test_a_hostile_keyframe_is_a_named_error(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "keyframe.safetensors"
    path.write_bytes(content)

    with pytest.raises(CorruptWeights, match=sentence):
        Mirror.open(path, 0)
