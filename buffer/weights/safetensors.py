"""The layout of a safetensors file, read and written without a framework: a keyframe is one."""

import json
import mmap
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from buffer.errors import CorruptWeights
from buffer.weights.tensors import TensorSpec

MAX_HEADER_BYTES: Final = 16 << 20
_LENGTH: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and where its bytes lie in the file."""

    spec: TensorSpec
    start: int
    stop: int


def write_header(specs: Iterable[TensorSpec]) -> tuple[bytes, list[Placed]]:
    """Return the head of a file and where it puts each tensor: widest values first, so that all are aligned."""
    ordered = sorted(specs, key=lambda spec: -spec.width)
    entries: dict[str, Any] = {}
    offset = 0
    for spec in ordered:
        end = offset + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT)
    head = _LENGTH.pack(len(header)) + header
    return head, _placed(entries, len(head))


def read_header(start_of_file: bytes | memoryview, file_bytes: int) -> list[Placed]:
    """Return where the tensors of a file lie. Raises CorruptWeights when they do not fill it exactly."""
    if file_bytes < _LENGTH.size:
        raise CorruptWeights(f"a keyframe of {file_bytes} bytes is no safetensors file")
    (num_bytes,) = _LENGTH.unpack(start_of_file[: _LENGTH.size])
    if num_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH.size):
        raise CorruptWeights(f"the header of a keyframe claims {num_bytes} bytes of {file_bytes}")
    try:
        entries = json.loads(bytes(start_of_file[_LENGTH.size : _LENGTH.size + num_bytes]))
        entries.pop("__metadata__", None)
        placed = _placed(entries, _LENGTH.size + num_bytes)
    except (ValueError, TypeError, KeyError, AttributeError, ValidationError, RecursionError) as error:
        raise CorruptWeights(f"the header of a keyframe is malformed: {type(error).__name__}") from error
    _check(placed, _LENGTH.size + num_bytes, file_bytes)
    return placed


def _placed(entries: dict[str, Any], data_start: int) -> list[Placed]:
    placed = []
    for name, entry in entries.items():
        spec = TensorSpec(name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]))
        start, stop = entry["data_offsets"]
        if type(start) is not int or type(stop) is not int:
            raise ValueError("offsets are integers")
        placed.append(Placed(spec, data_start + start, data_start + stop))
    return placed


def _check(placed: Sequence[Placed], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in sorted(placed, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end or tensor.stop - tensor.start != tensor.spec.num_bytes:
            raise CorruptWeights(f"tensor {tensor.spec.name} of a keyframe lies at {tensor.start} to {tensor.stop}")
        end = tensor.stop
    if end != file_bytes:
        raise CorruptWeights(f"the tensors of a keyframe end at byte {end} of {file_bytes}")


def join(parts: Sequence[Path], target: Path) -> None:
    """Write the tensors of several files into one. Raises CorruptWeights: one is malformed, or a name occurs twice."""
    sources = [(mapped, tensor) for mapped in map(_mapped, parts) for tensor in read_header(mapped, len(mapped))]
    where = {tensor.spec.name: (mapped, tensor) for mapped, tensor in sources}
    if len(where) != len(sources):
        raise CorruptWeights("two parts of a keyframe hold the same tensor")
    head, placed = write_header(tensor.spec for _, tensor in sources)
    with target.open("wb") as file:
        file.write(head)
        for place in placed:
            mapped, tensor = where[place.spec.name]
            file.write(mapped[tensor.start : tensor.stop])


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        size = path.stat().st_size
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")
