"""Published weights in a directory: a crash at any byte leaves the previous version served.

blobs/<sha256>            payloads, immutable
manifests/<version>.json  one per kept version
LATEST                    the number of the version that is served; its rename is the commit
pinned/<version>          a version that retention leaves alone, such as the best one
incoming/                 unfinished writes, never read
deleted_total             versions removed by retention, all time
lock                      held while a version is committed, so that several processes may share the directory
"""

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from buffer.disk import sync
from buffer.errors import NotFound, StoreUnavailable
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.retention import (
    Manifests,
    StoredBlob,
    absent_blob,
    absent_version,
    check_publication,
    described,
    kept_versions,
    occupied_bytes,
    proven,
    rubbish,
)
from buffer.weights.store import CHUNK_BYTES, PublishedVersion, WeightsStatus, WeightStoreSettings, write_chunks


class DirectoryWeightStore:
    """A ServedWeightStore on a local or shared file system. Threads and processes may share it."""

    def __init__(
        self, directory: Path, *, settings: WeightStoreSettings | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings or WeightStoreSettings()
        self._clock = clock
        self.directory = directory
        self._blobs = directory / "blobs"
        self._manifests = directory / "manifests"
        self._incoming = directory / "incoming"
        self._known: dict[PolicyVersion, PublishedVersion] = {}
        self._pinned = directory / "pinned"
        with _disk_errors():
            for path in (self._blobs, self._manifests, self._incoming, self._pinned):
                path.mkdir(parents=True, exist_ok=True)

    @property
    def location(self) -> str:
        """See ServedWeightStore."""
        return str(self.directory)

    @property
    def poll_s(self) -> float:
        """See ServedWeightStore."""
        return self._settings.poll_s

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """See WeightStore. The payload is on disk under its name, whole and synced, or not at all."""
        max_bytes = self._settings.max_bytes
        with self._lock():
            room = max_bytes - occupied_bytes(_stored_in(self._blobs), self._committed(), self._pinned_versions())
        with self._incoming_file() as file:
            for chunk in proven(chunks, sha256=sha256, room_bytes=room, max_bytes=max_bytes):
                file.write(chunk)
            _commit(file, self._blobs / sha256)

    def publish(self, manifest: Manifest) -> None:
        """See WeightStore."""
        with self._lock():
            latest = self.latest()
            if latest is not None and manifest.model_dump_json() == latest.model_dump_json():
                return
            check_publication(manifest, latest, self.blob_bytes)
            for version in self._stored_versions():
                if latest is None or version > latest.version:  # left by a publisher that died before its commit
                    self._manifest_path(version).unlink()
            self._replace(self._manifest_path(manifest.version), manifest.model_dump_json().encode())
            self._replace(self.directory / "LATEST", str(manifest.version).encode())
            self._collect()

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        """See WeightStore."""
        deadline = time.monotonic() + wait_s
        while True:
            version = self.latest_version()
            if version > after:
                try:
                    return self.manifest(version)
                except NotFound as error:
                    if self.latest_version() == version:
                        raise StoreUnavailable(f"{self.directory} has lost its latest version {version}") from error
                    continue  # retention took it since the look at LATEST: look again
            if time.monotonic() >= deadline:
                return None
            time.sleep(self._settings.poll_s)

    def latest_version(self) -> PolicyVersion:
        """See ServedWeightStore."""
        with _disk_errors():
            try:
                return int((self.directory / "LATEST").read_text())
            except FileNotFoundError:
                return -1

    def manifest(self, version: PolicyVersion) -> Manifest:
        """See WeightStore."""
        path = self._manifest_path(version)
        with _disk_errors():
            try:
                if version > self.latest_version():
                    raise FileNotFoundError  # not committed
                return Manifest.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                raise absent_version(version, self._settings.keep_versions) from None
            except ValidationError as error:
                hint = "restore it or remove the weights directory"
                raise StoreUnavailable(f"{path} is damaged", hint=hint) from error

    def blob(self, sha256: str) -> Iterator[bytes]:
        """See WeightStore."""
        return self.blob_range(sha256, 0, self.blob_bytes(sha256))

    def download(self, payload: Payload, path: Path) -> None:
        """See WeightStore."""
        write_chunks(self.blob(payload.sha256), path)

    def blob_bytes(self, sha256: str) -> int:
        """See ServedWeightStore."""
        with _disk_errors():
            try:
                return (self._blobs / sha256).stat().st_size
            except FileNotFoundError:
                raise absent_blob(sha256) from None

    def blob_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See ServedWeightStore. A payload that retention takes meanwhile is sent to its end: the file is open."""
        with _disk_errors(), self._opened(sha256) as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
                start += len(chunk)
                yield chunk

    def _opened(self, sha256: str) -> FileIO:
        try:
            return (self._blobs / sha256).open("rb", buffering=0)
        except FileNotFoundError:
            raise absent_blob(sha256) from None

    def pin(self, version: PolicyVersion) -> None:
        """See ServedWeightStore."""
        with self._lock():
            self.manifest(version)
            (self._pinned / str(version)).touch()

    def unpin(self, version: PolicyVersion) -> None:
        """See ServedWeightStore."""
        with _disk_errors():
            (self._pinned / str(version)).unlink(missing_ok=True)

    def status(self) -> WeightsStatus:
        """See ServedWeightStore."""
        with self._lock():
            latest = self.latest_version()
            versions = [version for version in self._stored_versions() if version <= latest]
            self._known = {version: known for version, known in self._known.items() if version in versions}
            return WeightsStatus(
                latest_version=latest,
                versions=versions,
                published=[self._described(version) for version in versions],
                bytes=sum(blob.size_bytes for blob in _stored_in(self._blobs)),
                deleted_total=self._deleted_total(),
            )

    def _described(self, version: PolicyVersion) -> PublishedVersion:
        """Read a committed manifest once: it never changes, and pollers ask every second."""
        if version not in self._known:
            self._known[version] = described(self.manifest(version))
        return self._known[version]

    def _manifest_path(self, version: PolicyVersion) -> Path:
        return self._manifests / f"{version}.json"

    def _stored_versions(self) -> list[PolicyVersion]:
        return sorted(int(path.stem) for path in self._manifests.glob("*.json"))

    def _committed(self) -> Manifests:
        latest = self.latest_version()
        return {version: self.manifest(version) for version in self._stored_versions() if version <= latest}

    def _deleted_total(self) -> int:
        try:
            return int((self.directory / "deleted_total").read_text())
        except FileNotFoundError:
            return 0

    def _collect(self) -> None:
        """Delete versions beyond retention, then the blobs that no kept version names: pointers first, data last."""
        manifests = self._committed()
        kept = kept_versions(manifests, self._pinned_versions(), self._settings)
        dropped = [version for version in manifests if version not in kept]
        if dropped:
            self._replace(self.directory / "deleted_total", str(self._deleted_total() + len(dropped)).encode())
        for version in dropped:
            self._manifest_path(version).unlink()
        expired_s = self._clock() - self._settings.orphan_age_s
        stays, goes = [manifests[version] for version in kept], [manifests[version] for version in dropped]
        for directory in (self._blobs, self._incoming):
            for name in rubbish(_stored_in(directory), kept=stays, dropped=goes, expired_s=expired_s):
                (directory / name).unlink(missing_ok=True)

    def _pinned_versions(self) -> set[PolicyVersion]:
        return {int(path.name) for path in self._pinned.iterdir()}

    def _replace(self, path: Path, content: bytes) -> None:
        with self._incoming_file() as file:
            file.write(content)
            _commit(file, path)

    @contextmanager
    def _incoming_file(self) -> Iterator[BinaryIO]:
        """Hand out a new file; it is gone afterwards unless it was committed."""
        with _disk_errors(), (self._incoming / uuid.uuid4().hex).open("xb") as file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with _disk_errors(), (self.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _stored_in(directory: Path) -> Iterator[StoredBlob]:
    for entry in os.scandir(directory):
        facts = entry.stat()
        yield StoredBlob(entry.name, facts.st_size, facts.st_mtime)


def _commit(file: BinaryIO, path: Path) -> None:
    """Make a written file appear under its name in one step that survives power loss."""
    file.flush()
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    sync(path.parent)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"the weight store meets a disk error: {error}", hint="check the disk") from error
