"""A published tensor: a name, a dtype and a shape, and its values as unsigned integers, bit for bit."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field

from buffer.types import Record

Bits = npt.NDArray[Any]
"""Values as unsigned integers of their width, flat: NaN payloads and negative zeros stay what they are."""
DType = Literal[
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "I64", "U64", "F64"
]
"""The names that safetensors uses."""
WIDTHS: Final[dict[str, int]] = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 2)
    | dict.fromkeys(("I32", "U32", "F32"), 4)
    | dict.fromkeys(("I64", "U64", "F64"), 8)
)
"""Bytes of one value."""
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""xxh3-128 of a tensor's bytes: it tells an accident, at the speed of memory; sha256 tells more, ten times slower."""


class TensorSpec(Record):
    """What a tensor is called and made of."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    """Its checkpoint name; a weight that has several is published under one of them."""
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48)], ...], Field(max_length=16, strict=False)]

    @property
    def num_values(self) -> int:
        """Values in it; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return WIDTHS[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return self.num_values * self.width

    @property
    def bits_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of its Bits."""
        return np.dtype(f"<u{self.width}")


class Values(Protocol):
    """A tensor whose values can be read piece by piece, so that no second copy of it is needed."""

    @property
    def spec(self) -> TensorSpec:
        """What it is."""
        ...

    def read(self, start: int, stop: int) -> Bits:
        """Return the values [start, stop) in the order of memory."""
        ...


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor in host memory; `Values` over it are views."""

    spec: TensorSpec
    bits: Bits  # [num_values]

    def read(self, start: int, stop: int) -> Bits:
        """See Values."""
        return self.bits[start:stop]

    def digest(self) -> str:
        """Return its Xxh3."""
        return xxhash.xxh3_128_hexdigest(self.bits.view(np.uint8).data)


def checksum(tensors: Iterable[tuple[TensorSpec, str]]) -> str:
    """Return the sha256 over specs and Xxh3 of a set of tensors, in any order: the identity of a version's weights."""
    lines = sorted(f"{spec.name}\0{spec.dtype}\0{list(spec.shape)}\0{xxh3}\n" for spec, xxh3 in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
