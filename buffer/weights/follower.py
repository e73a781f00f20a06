"""Following the published versions: an actor's mirror, brought to a version the cheapest way and proven."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from buffer.errors import CorruptWeights, WrongBase
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.mirror import Mirror
from buffer.weights.plan import Step, cheapest_path
from buffer.weights.progress import progress_path
from buffer.weights.safetensors import join
from buffer.weights.store import WeightStore

log = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_PART = "part-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What the way to a version cost."""

    payload_bytes: int
    steps: tuple[str, ...]
    """Kinds of the steps taken, such as (delta, delta)."""
    seconds: float
    """Download, decoding and proof."""


class Follower:
    """Owns a directory with the mapped mirror and with downloads that broke off. Not for several threads."""

    def __init__(self, store: WeightStore, directory: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._directory = directory
        self._monotonic = monotonic
        self._mirror: Mirror | None = None

    def follow(self, manifest: Manifest) -> tuple[Mirror, Fetched]:
        """Bring the mirror to a version; a delta that cannot be used is answered by a keyframe at once.

        Raises CorruptWeights when the way over a keyframe leads to other weights too, NotFound when retention was
        faster, and what the store raises; the next call goes on from what is proven.
        """
        began_s = self._monotonic()
        path = cheapest_path(manifest, None if self._mirror is None else self._mirror.version)
        try:
            mirror = self._take(path, manifest)
        except (CorruptWeights, WrongBase) as error:
            self.discard()
            if path and path[0].base_version is None:
                raise
            log.warning("version %d comes by keyframe: %s", manifest.version, error)
            path = cheapest_path(manifest, None)
            mirror = self._take(path, manifest)
        return mirror, Fetched(
            payload_bytes=sum(step.size_bytes for step in path),
            steps=tuple("keyframe" if step.base_version is None else "delta" for step in path),
            seconds=self._monotonic() - began_s,
        )

    def discard(self) -> None:
        """Forget the mirror: the next way begins at a keyframe."""
        self._mirror = None
        self._file("mirror").unlink(missing_ok=True)

    def _take(self, path: tuple[Step, ...], manifest: Manifest) -> Mirror:
        self._forget_parts({self._part(part) for step in path for part in step.parts})
        for step in path:
            with self._downloaded(step) as files:
                if step.base_version is None:
                    self._open(files, step.version)
                else:
                    assert self._mirror is not None, "a way that does not begin at a keyframe begins at the mirror"
                    chunks = [_chunks(file) for file in files]
                    self._mirror.apply(chunks, base_version=step.base_version, version=step.version)
        assert self._mirror is not None
        if self._mirror.checksum != manifest.checksum:
            raise CorruptWeights(
                f"the way to version {manifest.version} leads to other weights than its manifest names",
                hint="it is fetched again, from a keyframe on",
            )
        return self._mirror

    def _open(self, files: Sequence[Path], version: PolicyVersion) -> None:
        whole = files[0]
        if len(files) > 1:
            whole = self._file("joined")
            join(files, whole)
        self.discard()
        self._mirror = Mirror.open(whole.rename(self._file("mirror")), version)

    @contextmanager
    def _downloaded(self, step: Step) -> Iterator[list[Path]]:
        """Yield the files of a step, gone afterwards; what a broken download left stays for the next one."""
        files = [self._part(part) for part in step.parts]
        for file, part in zip(files, step.parts, strict=True):
            self._store.download(part, file)
        try:
            yield files
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    def _forget_parts(self, wanted: set[Path]) -> None:
        """Delete what is left of downloads that no step wants, of an earlier process too."""
        kept = wanted | {progress_path(part) for part in wanted}
        for left in self._directory.glob(f"{_PART}*"):
            if left not in kept:
                left.unlink()

    def _part(self, payload: Payload) -> Path:
        return self._file(f"{_PART}{payload.sha256}")

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk
