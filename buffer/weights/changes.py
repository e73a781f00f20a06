"""What differs between two versions of a block of values, and its few bytes on the wire.

A block is BLOCK_VALUES values of one tensor, the last one what remains. Its record, little-endian:

    u8   form      0 unchanged, 1 gaps, 2 mask, 3 raw
    u32  count     changed values; the record of an unchanged block ends here with 0
    then streams, each  u8 packing (0 stored, 1 zstd), u32 plain bytes, u32 sent bytes, the bytes:
    gaps           gap before each changed value, 255 = "255 further, go on"; then the planes of the steps
    mask           one bit a value, first value lowest; then the planes of the steps
    raw            the new values

A step is the distance from the old value to the new one in units in the last place: both are mapped to integers in the
order of their values (+1 is the next larger float), subtracted, and zig-zagged without 0 (-1, 1, -2, 2 -> 0, 1, 2, 3).
Plane k holds byte k of every step; most steps of a training update are -1 or 1, so all planes but the first are nearly
empty. Every bit pattern has its own integer: the mapping loses nothing, whatever the bits mean.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from buffer.errors import CorruptWeights
from buffer.weights.tensors import Bits

BLOCK_VALUES: Final = 1 << 22
"""Values a block: few enough that its temporaries are small, enough that the tables of zstd do not count."""
UNCHANGED, GAPS, MASK, RAW = range(4)
_SCAN_VALUES: Final = 1 << 18  # compared at a time: the result of the comparison stays in the cache
_SPARSE_ONE_IN: Final = 8  # up to one change in 8 values gaps are as short as a mask, and raw never pays
_STORED, _ZSTD = range(2)
_RECORD: Final = struct.Struct("<BI")
_STREAM: Final = struct.Struct("<BII")

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Read = Callable[[int], bytes]
"""Hands out the next so many bytes of a container; raises CorruptWeights at its end."""


@dataclass(frozen=True, slots=True)
class Change:
    """Where two versions of a block differ, and what stood there; when that is nearly everywhere, both blocks whole."""

    size: int
    where: npt.NDArray[np.uint32] | Bytes | None
    """Positions, or where those are longer one bit a value, the first value lowest; None: `old` is the whole block."""
    old: Bits
    """A copy of the old values at `where`, or the argument itself."""
    new: Bits
    """The whole new block: the argument itself, not to be changed before the change is packed."""

    @property
    def is_scattered(self) -> bool:
        """Whether so little differs that writing it is cheaper than copying the block."""
        return self.where is not None and self.where.dtype == np.uint32

    def positions(self) -> Positions | npt.NDArray[np.uint32]:
        """Return the positions of a sparse change."""
        assert self.where is not None, "a dense change has no positions"
        if self.is_scattered:
            return self.where.view(np.uint32)
        bits = np.unpackbits(self.where.view(np.uint8), count=self.size, bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))  # of bytes it would take many times as long


def find_change(old: Bits, new: Bits, *seen: Callable[[Bits, Bits], object]) -> Change | None:
    """Compare two versions of a block. Of a sparse change the old values are copied, a dense one holds the argument.

    `seen` is called with each piece of both, in order: what it reads lies in the cache.
    """
    found: list[Positions] = []
    count = 0
    for start in range(0, len(old), _SCAN_VALUES):
        pieces = old[start : start + _SCAN_VALUES], new[start : start + _SCAN_VALUES]
        if count * _SPARSE_ONE_IN <= len(old):
            positions = _differing(*pieces)
            count += len(positions)
            found.append(positions + start)
        for look in seen:
            look(*pieces)
    if count * _SPARSE_ONE_IN > len(old):
        return Change(size=len(old), where=None, old=old, new=new)
    if not count:
        return None
    at = np.concatenate(found)
    where: npt.NDArray[np.uint32] | Bytes = at.astype(np.uint32)
    if where.nbytes * 8 > len(old):
        bits = np.zeros(len(old), np.bool_)
        bits[at] = True
        where = np.packbits(bits, bitorder="little")
    return Change(size=len(old), where=where, old=old[at], new=new)


def _differing(old: Bits, new: Bits) -> Positions:
    """Return where two arrays differ: words of 8 bytes are compared first, then the values in those that differ."""
    shift = 3 - (old.itemsize.bit_length() - 1)  # a word has 2 ** shift values
    whole = len(old) >> shift << shift
    old_words, new_words = old[:whole].view(np.uint64), new[:whole].view(np.uint64)
    words = np.flatnonzero(old_words != new_words)
    within = np.flatnonzero(old_words[words].view(old.dtype) != new_words[words].view(old.dtype))
    at = (words[within >> shift] << shift) + (within & ((1 << shift) - 1))
    rest = np.flatnonzero(old[whole:] != new[whole:])
    return np.concatenate([at, rest + whole]) if len(rest) else at


class Packer:
    """Writes the records of blocks. Not for several threads."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=1, write_content_size=True)

    def pack(self, change: Change | None) -> bytes:
        """Return the record of a change: gaps of a sparse one, the shorter of mask and raw of a dense one."""
        if change is None:
            return _RECORD.pack(UNCHANGED, 0)
        if change.where is not None:
            positions = change.positions()
            planes = self._planes(change.old, change.new[positions])
            return self._record(GAPS, len(change.old), [self._stream(_gaps(positions)), *planes])
        changed = change.old != change.new
        count = int(np.count_nonzero(changed))
        planes = self._planes(change.old[changed], change.new[changed])
        records = (  # gaps would take half of the time, and are at best 4 % shorter than a mask
            self._record(MASK, count, [self._stream(np.packbits(changed, bitorder="little")), *planes]),
            self._record(RAW, change.size, [self._stream(change.new.view(np.uint8))]),
        )
        return min(records, key=len)

    def _planes(self, old: Bits, new: Bits) -> list[bytes]:
        steps = steps_between(old, new)
        planes = steps.view(np.uint8).reshape(len(steps), -1).T
        return [self._stream(np.ascontiguousarray(plane)) for plane in planes]

    def _record(self, form: int, count: int, streams: list[bytes]) -> bytes:
        return b"".join([_RECORD.pack(form, count), *streams])

    def _stream(self, plain: Bytes) -> bytes:
        sent, packing = self._zstd.compress(plain.data), _ZSTD
        if len(sent) >= len(plain):
            sent, packing = plain.tobytes(), _STORED
        return _STREAM.pack(packing, len(plain), len(sent)) + sent


class Unpacker:
    """Applies the records of blocks in place. Not for several threads."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def apply(self, read: Read, block: Bits) -> bool:
        """Read one record and change `block` by it; return whether it did. Raises CorruptWeights, `block` then unknown.

        No field of a record is believed before it is within what a block of this size can need.
        """
        size, width = len(block), block.itemsize
        form, count = _RECORD.unpack(read(_RECORD.size))
        if form == UNCHANGED and count == 0:
            return False
        if form not in (GAPS, MASK, RAW) or not 1 <= count <= size:
            raise CorruptWeights(f"a block of {size} values has a record of form {form} with {count} changes")
        if form == RAW:
            block[:] = self._stream(read, size * width, size * width).view(block.dtype)
            return True
        if form == GAPS:
            at = _positions(self._stream(read, count, count + size // 255), count, size)
        else:
            bits = self._stream(read, -(-size // 8), -(-size // 8))
            at = np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little").view(np.bool_))
            if len(at) != count:
                raise CorruptWeights(f"a mask marks {len(at)} values, its record says {count}")
        planes = [self._stream(read, count, count) for _ in range(width)]
        steps = np.stack(planes, axis=1).view(block.dtype).reshape(-1) if width > 1 else planes[0].view(block.dtype)
        block[at] = stepped(block[at], steps)
        return True

    def _stream(self, read: Read, least: int, most: int) -> Bytes:
        """Return a stream of `least` to `most` plain bytes."""
        packing, plain, sent = _STREAM.unpack(read(_STREAM.size))
        if packing not in (_STORED, _ZSTD) or not least <= plain <= most or sent > plain:
            raise CorruptWeights(f"a stream of {sent} bytes for {plain}, packing {packing}, where {most} fit")
        if packing == _STORED and sent != plain:
            raise CorruptWeights(f"a stored stream of {plain} bytes has {sent}")
        content = read(sent)
        if packing == _ZSTD:
            content = self._decompressed(content, plain)
        return np.frombuffer(content, np.uint8)

    def _decompressed(self, frame: bytes, plain: int) -> bytes:
        try:
            if zstandard.get_frame_parameters(frame).content_size != plain:  # zstandard allocates what the frame says
                raise CorruptWeights("a zstd frame has another size than its stream")
            return self._zstd.decompress(frame, max_output_size=plain, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptWeights(f"a zstd frame is damaged: {error}") from error


def steps_between(old: Bits, new: Bits) -> Bits:
    """Return the zig-zagged steps from values to values that differ from them."""
    distance = _order(new) - _order(old)
    return ((distance << 1) ^ (0 - (distance >> _sign_shift(old)))) - 1


def stepped(old: Bits, steps: Bits) -> Bits:
    """Return the values that lie `steps` away: the inverse of `steps_between`."""
    zigzag = steps + 1
    return _unorder(_order(old) + ((zigzag >> 1) ^ (0 - (zigzag & 1))))


def _order(bits: Bits) -> Bits:
    """Map bit patterns of floats to unsigned integers in the order of the values; -0 lies just below +0."""
    ordered: Bits = bits ^ ((0 - (bits >> _sign_shift(bits))) | _sign(bits))
    return ordered


def _unorder(ordered: Bits) -> Bits:
    bits: Bits = ordered ^ (((ordered >> _sign_shift(ordered)) - 1) | _sign(ordered))
    return bits


def _sign_shift(bits: Bits) -> int:
    return 8 * bits.itemsize - 1


def _sign(bits: Bits) -> Any:
    return bits.dtype.type(1 << _sign_shift(bits))


def _gaps(positions: npt.NDArray[Any]) -> Bytes:
    gaps = positions.astype(np.int64)
    gaps[1:] -= gaps[:-1] + 1
    lengths = gaps // 255 + 1
    coded = np.full(int(lengths.sum()), 255, np.uint8)
    coded[np.cumsum(lengths) - 1] = gaps % 255
    return coded


def _positions(gaps: Bytes, count: int, size: int) -> Positions:
    ends = np.flatnonzero(gaps != 255)
    if len(ends) != count or ends[-1] != len(gaps) - 1:
        raise CorruptWeights(f"gaps name {len(ends)} values, their record says {count}")
    positions = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(count)
    if positions[-1] >= size:
        raise CorruptWeights(f"gaps lead to value {positions[-1]} of a block of {size}")
    return positions
