"""The weight store protocol: blobs first, the manifest as the commit."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from buffer.types import PolicyVersion, Record
from buffer.weights.manifest import Manifest, Payload


class PublishedVersion(Record):
    """A version that is still served."""

    version: PolicyVersion
    created_s: float
    """Unix time at publication, by the learner's clock."""
    bytes: int
    """Of its own payloads: its delta, and its keyframe if it has one."""


class WeightsStatus(Record):
    """What is published."""

    latest_version: PolicyVersion
    versions: list[PolicyVersion]
    """Versions still served, oldest first."""
    published: list[PublishedVersion]
    """The same with what they weigh."""
    bytes: int
    """Stored payload bytes."""
    deleted_total: int
    """Versions that retention has removed."""


class WeightStore(Protocol):
    """Where published versions live. Data first, pointer last: a version that is served is whole."""

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """Store a payload under its hash; storing it twice is harmless. Raises CorruptWeights on a wrong hash."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Commit a version whose blobs are stored. Committing the latest manifest once more is harmless (a retry).

        Raises Conflict when the version is not above the latest one, NotFound when a blob is missing, RunMismatch
        for another run or model than before.
        """
        ...

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        """Return the latest manifest if its version is above `after`, waiting up to `wait_s` for one; else None."""
        ...

    def manifest(self, version: PolicyVersion) -> Manifest:
        """Return one version's manifest. Raises NotFound."""
        ...

    def blob(self, sha256: str) -> Iterable[bytes]:
        """Stream a payload in chunks. Raises NotFound."""
        ...

    def download(self, payload: Payload, path: Path) -> None:
        """Write a payload to a file; whoever reads it checks it. Raises NotFound when retention took it meanwhile."""
        ...


def write_chunks(chunks: Iterable[bytes], path: Path) -> None:
    """Write chunks to a file: a `download` for stores that only stream."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
