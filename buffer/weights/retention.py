"""The rules that every weight store obeys: what may follow what, what is kept, and what is rubbish."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from buffer.errors import Conflict, CorruptWeights, NotFound, RunMismatch, StoreUnavailable
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest
from buffer.weights.store import PublishedVersion, WeightStoreSettings

Manifests = Mapping[PolicyVersion, Manifest]
"""Committed ones by version, oldest first."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A payload that is stored, whether a version names it or not."""

    sha256: str
    size_bytes: int
    stored_s: float
    """Unix time."""


def proven(chunks: Iterable[bytes], *, sha256: str, room_bytes: int, max_bytes: int) -> Iterator[bytes]:
    """Yield an upload as it comes. Raises CorruptWeights at its end on a wrong hash, StoreUnavailable out of room."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        room_bytes -= len(chunk)
        if room_bytes < 0:
            raise StoreUnavailable(
                f"the payload does not fit: the latest version and other uploads leave too little of"
                f" weights.max_bytes={max_bytes}",
                hint="raise weights.max_bytes, or publish smaller versions",
            )
        yield chunk
    if digest.hexdigest() != sha256:
        raise CorruptWeights(
            f"the payload has the hash {digest.hexdigest()}, not {sha256}", hint="send it again: it was dropped"
        )


def check_publication(manifest: Manifest, latest: Manifest | None, size_of: Callable[[str], int]) -> None:
    """Raise Conflict, NotFound or RunMismatch unless a version may follow the latest one and its payloads are stored.

    `size_of` returns the bytes of a payload, and raises NotFound.
    """
    if latest is not None:
        _check_succession(manifest, latest)
    for payload in manifest.payloads:
        if size_of(payload.sha256) != payload.size_bytes:
            raise Conflict(f"blob {payload.sha256} does not have {payload.size_bytes} bytes")


def _check_succession(manifest: Manifest, latest: Manifest) -> None:
    if manifest.run_id != latest.run_id:
        raise RunMismatch(f"the version is of run {manifest.run_id}, the store holds run {latest.run_id}")
    if manifest.model_fingerprint != latest.model_fingerprint:
        raise RunMismatch(
            f"the version is of model {manifest.model_fingerprint}, the store holds {latest.model_fingerprint}",
            hint="one run trains one model: give the run another name",
        )
    if manifest.version <= latest.version:
        raise Conflict(
            f"version {manifest.version} is not above the latest published one, {latest.version}",
            hint="a resumed learner starts its clock above the latest version",
        )


def kept_versions(
    manifests: Manifests, pinned: Set[PolicyVersion], settings: WeightStoreSettings
) -> list[PolicyVersion]:
    """Return the versions that stay: the newest and the pinned ones, of them no more old ones than there is room."""
    versions = sorted(manifests)
    kept = sorted({*(pinned & set(versions)), *versions[-settings.keep_versions :]})
    for version in [version for version in kept[:-1] if version not in pinned]:
        if sum(named_blobs(manifests[v] for v in kept).values()) > settings.max_bytes:
            kept.remove(version)
    return kept


def named_blobs(manifests: Iterable[Manifest]) -> dict[str, int]:
    """Return the bytes of each payload that some version names, by sha256."""
    return {payload.sha256: payload.size_bytes for manifest in manifests for payload in manifest.payloads}


def rubbish(
    stored: Iterable[StoredBlob], *, kept: Iterable[Manifest], dropped: Iterable[Manifest], expired_s: float
) -> list[str]:
    """Return the payloads that no kept version names: those of dropped versions, and uploads that came to nothing."""
    named, retired = named_blobs(kept), named_blobs(dropped)
    return [b.sha256 for b in stored if b.sha256 not in named and (b.sha256 in retired or b.stored_s < expired_s)]


def occupied_bytes(stored: Iterable[StoredBlob], manifests: Manifests, pinned: Set[PolicyVersion]) -> int:
    """Return what a commit will not free: the latest and pinned versions, and uploads that no version names yet."""
    stays = {max(manifests, default=-1), *pinned}
    needed = named_blobs(manifest for version, manifest in manifests.items() if version in stays)
    older = named_blobs(manifest for version, manifest in manifests.items() if version not in stays)
    return sum(blob.size_bytes for blob in stored if blob.sha256 in needed or blob.sha256 not in older)


def described(manifest: Manifest) -> PublishedVersion:
    """Return what a version weighs by itself."""
    size = sum(payload.size_bytes for payload in manifest.payloads if payload.version == manifest.version)
    return PublishedVersion(version=manifest.version, created_s=manifest.created_s, bytes=size)


def absent_version(version: PolicyVersion, keep_versions: int) -> NotFound:
    """Return the error for a version that is not stored, or not yet committed."""
    return NotFound(
        f"version {version} is not stored", hint=f"the newest {keep_versions} versions are kept: ask for the latest"
    )


def absent_blob(sha256: str) -> NotFound:
    """Return the error for a payload that is not stored."""
    return NotFound(
        f"blob {sha256} is not stored", hint="put it before its version; fetch it before its version is removed"
    )
