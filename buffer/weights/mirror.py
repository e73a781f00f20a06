"""The one host copy of the published weights that a learner and an actor each hold, moved on by deltas in place."""

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import xxhash

from buffer.errors import CorruptWeights, WrongBase
from buffer.types import PolicyVersion
from buffer.weights import safetensors
from buffer.weights.changes import Change, Unpacker, find_change
from buffer.weights.delta import ChangedTensor, DeltaHeader, Stream, TensorChange, blocks_of, read_header
from buffer.weights.tensors import HostTensor, TensorSpec, Values, checksum


class Mirror:
    """Published tensors by name, in a safetensors layout that is anonymous memory or a mapped file.

    `version` is None from the first byte that changes to the moment when the result is proven: a change that fails
    leaves it None for good, and the caller's answer is a keyframe. Not for several threads.
    """

    def __init__(self, memory: memoryview, placed: Sequence[safetensors.Placed], *, path: Path | None = None) -> None:
        self._memory = memory
        self._tensors = {
            tensor.spec.name: HostTensor(
                tensor.spec, np.frombuffer(memory, tensor.spec.bits_dtype, tensor.spec.num_values, tensor.start)
            )
            for tensor in placed
        }
        self._digests: dict[str, str] = {}
        self._version: PolicyVersion | None = None
        self.path = path
        """The file that holds exactly these weights, if it is one: readers of safetensors may open it meanwhile."""

    @classmethod
    def open(cls, path: Path, version: PolicyVersion) -> Self:
        """Map a keyframe; changes go to the file. Raises CorruptWeights when it is no safetensors file."""
        with path.open("r+b") as file:
            size = path.stat().st_size
            memory = memoryview(mmap.mmap(file.fileno(), size) if size else b"")
        placed = safetensors.read_header(memory, size)
        mirror = cls(memory, placed, path=path)
        mirror._digests = {name: tensor.digest() for name, tensor in mirror._tensors.items()}
        mirror._version = version
        return mirror

    @classmethod
    def allocate(cls, specs: Iterable[TensorSpec]) -> Self:
        """Return a mirror in memory that holds no version yet: `advance` brings the first one."""
        head, placed = safetensors.write_header(specs)
        memory = memoryview(np.zeros(max((tensor.stop for tensor in placed), default=len(head)), np.uint8).data)
        memory[: len(head)] = head
        return cls(memory, placed)

    @property
    def version(self) -> PolicyVersion | None:
        """The version that it provably holds; None = nothing that may be used."""
        return self._version

    @property
    def tensors(self) -> Mapping[str, HostTensor]:
        """The tensors: views that change with the mirror."""
        return MappingProxyType(self._tensors)

    @property
    def digests(self) -> tuple[tuple[TensorSpec, str], ...]:
        """What each tensor is, with the Xxh3 of its values."""
        return tuple((tensor.spec, self._digests[name]) for name, tensor in self._tensors.items())

    @property
    def checksum(self) -> str:
        """What a manifest names: the sha256 over all specs and hashes."""
        return checksum(self.digests)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keyframe."""
        return len(self._memory)

    def keyframe(self, chunk_bytes: int = 4 << 20) -> Iterator[memoryview]:
        """Yield it as a safetensors file, in views."""
        for start in range(0, len(self._memory), chunk_bytes):
            yield self._memory[start : start + chunk_bytes]

    def apply(self, parts: Sequence[Iterable[bytes]], *, base_version: PolicyVersion, version: PolicyVersion) -> None:
        """Change it in place by a delta, which comes in one or several containers of different tensors.

        Raises WrongBase, the mirror then untouched, when a delta leads from other weights; CorruptWeights when one is
        malformed or its result has another hash, the mirror then not to be used.
        """
        if self._version != base_version:
            raise WrongBase(f"the delta leads from version {base_version}, the mirror holds {self._version}")
        streams = [Stream(chunks) for chunks in parts]
        headers = [read_header(stream.read) for stream in streams]
        for header in headers:
            self._check_base(header, base_version, version)
        unpacker = Unpacker()
        self._version = None  # until every part has proven its result
        for stream, header in zip(streams, headers, strict=True):
            for entry in header.tensors:
                self._apply_to(entry, stream, unpacker)
            stream.end()
        self._version = version

    def advance(self, tensors: Iterable[Values], version: PolicyVersion) -> list[TensorChange]:
        """Take over newer values of all tensors and return what changed, for `write_delta`; nothing at the first time.

        The old values are copied out where they differ, of a dense block all of them; the new ones stay views of the
        mirror: write the delta before advancing again.
        """
        self._version = None
        changed = []
        for values in tensors:
            tensor = self._tensors[values.spec.name]
            assert tensor.spec == values.spec, f"{values.spec.name} is not the tensor it was"
            before = self._digests.get(values.spec.name)
            if before is None:
                self._digests[values.spec.name] = _fill(tensor, values)
                continue
            digest = xxhash.xxh3_128()
            blocks = blocks_of(tensor.spec.num_values)
            changes = [_take_over(tensor, values, start, stop, digest) for start, stop in blocks]
            if any(change is not None for change in changes):
                after = self._digests[values.spec.name] = digest.hexdigest()
                entry = ChangedTensor(**dict(tensor.spec), base=before, result=after)
                changed.append(TensorChange(entry, changes))
        assert self._digests.keys() == self._tensors.keys(), "every tensor must come"
        self._version = version
        return changed

    def _check_base(self, header: DeltaHeader, base_version: PolicyVersion, version: PolicyVersion) -> None:
        if (header.base_version, header.version) != (base_version, version):
            raise WrongBase(
                f"the delta leads from version {header.base_version} to {header.version}, wanted was"
                f" {base_version} to {version}"
            )
        for entry in header.tensors:
            own = self._tensors.get(entry.name)
            if own is None or own.spec != TensorSpec(name=entry.name, dtype=entry.dtype, shape=entry.shape):
                raise WrongBase(f"the delta changes {entry.name} {entry.dtype}{list(entry.shape)}, which is not here")
            if self._digests[entry.name] != entry.base:
                raise WrongBase(
                    f"the delta leads from other values of {entry.name} than version {base_version} has here"
                )

    def _apply_to(self, entry: ChangedTensor, stream: Stream, unpacker: Unpacker) -> None:
        tensor = self._tensors[entry.name]
        for start, stop in blocks_of(tensor.spec.num_values):
            unpacker.apply(stream.read, tensor.bits[start:stop])
        self._digests[entry.name] = tensor.digest()
        if self._digests[entry.name] != entry.result:
            raise CorruptWeights(f"{entry.name} has another hash than the delta names", hint="fetch a keyframe")


def _fill(tensor: HostTensor, values: Values) -> str:
    """Give a tensor its first values; return its Xxh3."""
    for start, stop in blocks_of(tensor.spec.num_values):
        tensor.bits[start:stop] = values.read(start, stop)
    return tensor.digest()


def _take_over(tensor: HostTensor, values: Values, start: int, stop: int, digest: xxhash.xxh3_128) -> Change | None:
    """Make a block of the mirror what it now is, and hash that on the way."""
    own, new = tensor.bits[start:stop], values.read(start, stop)
    change = find_change(own, new, lambda _, piece: digest.update(piece.view(np.uint8).data))
    if change is None:
        return None
    old = own.copy() if change.where is None else change.old
    if change.is_scattered:
        positions = change.positions()
        own[positions] = new[positions]
    else:
        own[:] = new
    return Change(size=change.size, where=change.where, old=old, new=own)
