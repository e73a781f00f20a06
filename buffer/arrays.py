"""numpy arrays as pydantic fields: raw little-endian bytes in msgpack, lists in JSON, one validation for both."""

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import PlainSerializer, PlainValidator, SerializationInfo, WithJsonSchema

_KINDS = {"<i4": "iu", "<f4": "iuf", "|b1": "b"}  # numpy kinds a JSON list may have for each wire dtype


def _parse(value: object, dtype: str) -> npt.NDArray[Any]:
    """Read raw bytes, a list or an array as a read-only 1-d array of `dtype`; raise ValueError otherwise."""
    if isinstance(value, bytes | bytearray | memoryview):
        wire = np.dtype("u1" if dtype == "|b1" else dtype)
        if len(value) % wire.itemsize:
            raise ValueError(f"{len(value)} bytes are not a whole number of {wire.itemsize}-byte values")
        array = np.frombuffer(value, wire)
        if dtype == "|b1":
            if array.size and int(array.max()) > 1:
                raise ValueError("a mask byte must be 0 or 1")
            array = array.view(np.bool_)
    elif isinstance(value, list | tuple | np.ndarray):
        array = _from_list(value, dtype)
    else:
        raise ValueError(f"expected bytes or a list, got {type(value).__name__}")
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


def _from_list(value: list[object] | tuple[object, ...] | npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray) and dtype != "|b1" and any(isinstance(item, bool) for item in value):
        raise ValueError("expected numbers, got a boolean")
    raw = np.asarray(value) if len(value) else np.empty(0, dtype)
    if raw.ndim != 1 or raw.dtype.kind not in _KINDS[dtype]:
        raise ValueError(f"expected a flat list for {np.dtype(dtype).name}, got {raw.dtype.name} with {raw.ndim} axes")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which the record's own checks name
        array = raw.astype(dtype)
    if dtype == "<i4" and not np.array_equal(array, raw):
        raise ValueError("an integer does not fit 32 bits")
    return array


def _dump(array: npt.NDArray[Any], info: SerializationInfo) -> object:
    return array.tolist() if info.mode == "json" else array.tobytes()


def _field(dtype: str, item: dict[str, str]) -> tuple[Any, ...]:
    return (
        PlainValidator(lambda value: _parse(value, dtype)),
        PlainSerializer(_dump),
        WithJsonSchema({"type": "array", "items": item}),
    )


Int32Array = Annotated[npt.NDArray[np.int32], *_field("<i4", {"type": "integer"})]
Float32Array = Annotated[npt.NDArray[np.float32], *_field("<f4", {"type": "number"})]
BoolArray = Annotated[npt.NDArray[np.bool_], *_field("|b1", {"type": "boolean"})]
