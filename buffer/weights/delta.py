"""The delta container: the values that differ between two versions, and the hashes that prove the result.

    8 bytes  "SWDELTA\\n"
    u32      bytes of the header, little-endian
    header   JSON, see DeltaHeader: schema number, versions, the changed tensors with hashes before and after
    records  for each tensor of the header, in its order, one record a block (buffer.weights.changes)

Tensors that did not change are left out. Everything is read and written as a stream, a block at a time.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from buffer.errors import CorruptWeights
from buffer.types import PolicyVersion, Record
from buffer.weights.changes import BLOCK_VALUES, Change, Packer, Read
from buffer.weights.tensors import TensorSpec, Xxh3, checksum

MAGIC: Final = b"SWDELTA\n"
MAX_HEADER_BYTES: Final = 16 << 20
"""Some 60 thousand tensors; read before anything in it can be checked."""
_LENGTH: Final = struct.Struct("<I")


class ChangedTensor(TensorSpec):
    """One tensor of a delta."""

    base: Xxh3
    """Of the values that the records apply to."""
    result: Xxh3
    """Of the values that they lead to."""


class DeltaHeader(Record):
    """What a delta leads from and to."""

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    base_version: Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
    version: Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
    tensors: Annotated[tuple[ChangedTensor, ...], Field(strict=False)]
    checksum: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """buffer.weights.tensors.checksum of these tensors after the change."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.version <= self.base_version:
            raise ValueError(f"version {self.version} does not follow its base {self.base_version}")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("a tensor is named twice")
        if self.checksum != result_checksum(self.tensors):
            raise ValueError("the checksum is not that of the tensors")
        return self


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor's header entry and its changes, one for each block."""

    entry: ChangedTensor
    changes: Iterable[Change | None]


def result_checksum(tensors: Iterable[ChangedTensor]) -> str:
    """Return the checksum of what a delta's tensors become."""
    return checksum((tensor, tensor.result) for tensor in tensors)


def blocks_of(num_values: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of each block of a tensor."""
    for start in range(0, num_values, BLOCK_VALUES):
        yield start, min(start + BLOCK_VALUES, num_values)


def write_delta(
    base_version: PolicyVersion, version: PolicyVersion, tensors: Sequence[TensorChange]
) -> Iterator[bytes]:
    """Yield a container in pieces of at most one block each."""
    entries = tuple(tensor.entry for tensor in tensors)
    header = DeltaHeader(
        base_version=base_version, version=version, tensors=entries, checksum=result_checksum(entries)
    ).model_dump_json(by_alias=True)
    yield MAGIC + _LENGTH.pack(len(header.encode())) + header.encode()
    packer = Packer()
    for tensor in tensors:
        for change in tensor.changes:
            yield packer.pack(change)


def read_header(read: Read) -> DeltaHeader:
    """Read the header of a container. Raises CorruptWeights."""
    if (magic := read(len(MAGIC))) != MAGIC:
        raise CorruptWeights(f"a delta begins with {MAGIC!r}, this payload with {magic!r}")
    (num_bytes,) = _LENGTH.unpack(read(_LENGTH.size))
    if num_bytes > MAX_HEADER_BYTES:
        raise CorruptWeights(f"the header of a delta has {num_bytes} bytes, {MAX_HEADER_BYTES} are allowed")
    try:
        return DeltaHeader.model_validate_json(read(num_bytes))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise CorruptWeights(f"the header of a delta is malformed: {where or 'header'}: {first['msg']}") from None


class Stream:
    """Chunks of any size as a file to read exact numbers of bytes from."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes. Raises CorruptWeights when fewer are left."""
        parts: list[memoryview] = []
        missing = num_bytes
        while missing:
            if not self._rest and not self._next_chunk():
                raise CorruptWeights(f"a payload ends {missing} bytes early", hint="it was cut off: fetch it again")
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def end(self) -> None:
        """Raise CorruptWeights if anything is left."""
        if self._rest or self._next_chunk():
            raise CorruptWeights("a payload goes on after its end")

    def _next_chunk(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._rest = memoryview(chunk)
                return True
        return False
