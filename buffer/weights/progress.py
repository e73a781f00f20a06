"""How far a download is, in a small mapped file beside its target: what was received outlives a kill of the process.

8 bytes   "SWPART1\\n"
32 bytes  sha256 of the whole payload
u64       its bytes, little-endian
u64       bytes of one range
u64 ...   bytes received of each range, from its beginning
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from buffer.weights.manifest import Payload

_HEAD: Final = struct.Struct("<8s32sQQ")


@dataclass(frozen=True, slots=True)
class Progress:
    """The ranges of one download. A count is raised after its bytes are in the target, so it never says too much.

    That holds for a killed process; after a loss of power only the hash of the whole tells.
    """

    path: Path
    counts: npt.NDArray[np.uint64]  # a view of the file
    size_bytes: int
    range_bytes: int
    taken_up_bytes: int
    """What an earlier process had received."""

    @classmethod
    def open(cls, target: Path, payload: Payload, *, range_bytes: int) -> "Progress":
        """Take up what an earlier process left of this payload, or begin with an empty target."""
        path = progress_path(target)
        head = _HEAD.pack(b"SWPART1\n", bytes.fromhex(payload.sha256), payload.size_bytes, range_bytes)
        num_ranges = -(-payload.size_bytes // range_bytes)
        left = path.read_bytes() if path.is_file() else b""
        if not (
            left.startswith(head)
            and len(left) == len(head) + 8 * num_ranges
            and target.is_file()
            and target.stat().st_size == payload.size_bytes
        ):
            path.unlink(missing_ok=True)
            with target.open("wb") as file:
                file.truncate(payload.size_bytes)
            path.write_bytes(head + bytes(8 * num_ranges))
        with path.open("r+b") as file:
            counts: npt.NDArray[Any] = np.frombuffer(mmap.mmap(file.fileno(), 0), "<u8", num_ranges, _HEAD.size)
        return cls(path, counts, payload.size_bytes, range_bytes, int(counts.sum()))

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, start and stop of each range that is not whole."""
        for number, count in enumerate(self.counts):
            start = number * self.range_bytes
            stop = min(start + self.range_bytes, self.size_bytes)
            if count < stop - start:
                yield number, start, stop


def progress_path(target: Path) -> Path:
    """Return where the progress of a download to `target` is."""
    return target.with_name(target.name + ".progress")
