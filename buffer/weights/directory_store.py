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
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field, ValidationError

from buffer.errors import Conflict, CorruptWeights, NotFound, RunMismatch, StoreUnavailable
from buffer.settings import Settings
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.store import PublishedVersion, WeightsStatus, write_chunks

CHUNK_BYTES = 1 << 20


class WeightStoreSettings(Settings):
    """How many versions are served, and how soon rubbish goes."""

    keep_versions: Annotated[int, Field(ge=1)] = 4
    """Newest versions kept; an actor that downloads an older one finds it gone and asks for the latest."""
    max_bytes: Annotated[int, Field(ge=1)] = 256 << 30
    """Disk for payloads. Over it the oldest versions go first, but never the latest nor a pinned one (evaluation's
    best): an upload that does not fit beside them is refused. 256 GiB hold four bfloat16 keyframes of a 32 B model."""
    orphan_age_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which an upload that no version names is deleted; longer than any upload takes."""
    poll_s: Annotated[float, Field(gt=0)] = 0.05
    """Seconds between two looks at LATEST while someone waits for a version."""


class DirectoryWeightStore:
    """A WeightStore on a local or shared file system. Threads and processes may share it."""

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

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """See WeightStore. The payload is on disk under its name, whole and synced, or not at all."""
        room = self._settings.max_bytes - self._bytes_in_use()
        with self._incoming_file() as file:
            digest = hashlib.sha256()
            for chunk in chunks:
                digest.update(chunk)
                room -= file.write(chunk)
                if room < 0:
                    raise StoreUnavailable(
                        f"the payload does not fit: the latest version and other uploads leave too little of"
                        f" weights.max_bytes={self._settings.max_bytes}",
                        hint="raise weights.max_bytes, or publish smaller versions",
                    )
            if digest.hexdigest() != sha256:
                raise CorruptWeights(
                    f"the payload has the hash {digest.hexdigest()}, not {sha256}", hint="send it again: it was dropped"
                )
            _commit(file, self._blobs / sha256)

    def publish(self, manifest: Manifest) -> None:
        """See WeightStore. Publishing the very same latest manifest again is harmless: a retry after a lost answer.

        Raises RunMismatch for another run or model than the versions before.
        """
        with self._lock():
            latest = self.latest()
            if latest is not None:
                if manifest.model_dump_json() == latest.model_dump_json():
                    return
                _check_succession(manifest, latest)
            for payload in manifest.payloads:
                if self.blob_path(payload.sha256).stat().st_size != payload.size_bytes:
                    raise Conflict(f"blob {payload.sha256} does not have {payload.size_bytes} bytes")
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
        """Return the latest published version; -1 before the first."""
        try:
            return int((self.directory / "LATEST").read_text())
        except FileNotFoundError:
            return -1

    def manifest(self, version: PolicyVersion) -> Manifest:
        """See WeightStore."""
        path = self._manifest_path(version)
        try:
            if version > self.latest_version():
                raise FileNotFoundError  # not committed
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise NotFound(
                f"version {version} is not stored",
                hint=f"the newest {self._settings.keep_versions} versions are kept: ask for the latest",
            ) from None
        except ValidationError as error:
            raise StoreUnavailable(f"{path} is damaged", hint="restore it or remove the weights directory") from error

    def blob(self, sha256: str) -> Iterator[bytes]:
        """See WeightStore."""
        with self.blob_path(sha256).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def download(self, payload: Payload, path: Path) -> None:
        """See WeightStore."""
        write_chunks(self.blob(payload.sha256), path)

    def blob_path(self, sha256: str) -> Path:
        """Return the file of a payload, for servers that send files. Raises NotFound."""
        path = self._blobs / sha256
        if not path.is_file():
            raise NotFound(
                f"blob {sha256} is not stored", hint="put it before its version; fetch it before its version is removed"
            )
        return path

    def pin(self, version: PolicyVersion) -> None:
        """Keep a stored version until it is unpinned, whatever retention says. Raises NotFound."""
        with self._lock():
            self.manifest(version)
            (self._pinned / str(version)).touch()

    def unpin(self, version: PolicyVersion) -> None:
        """Let the next publication's retention take a version; one that is not pinned stays as it is."""
        with _disk_errors():
            (self._pinned / str(version)).unlink(missing_ok=True)

    def status(self) -> WeightsStatus:
        """Return what is published and how much disk it takes."""
        with self._lock():
            latest = self.latest_version()
            versions = [version for version in self._stored_versions() if version <= latest]
            self._known = {version: known for version, known in self._known.items() if version in versions}
            return WeightsStatus(
                latest_version=latest,
                versions=versions,
                published=[self._described(version) for version in versions],
                bytes=sum(entry.stat().st_size for entry in os.scandir(self._blobs)),
                deleted_total=self._deleted_total(),
            )

    def _described(self, version: PolicyVersion) -> PublishedVersion:
        """Read a committed manifest once: it never changes, and pollers ask every second."""
        if version not in self._known:
            manifest = self.manifest(version)
            size = sum(p.size_bytes for p in manifest.payloads if p.version == version)
            self._known[version] = PublishedVersion(version=version, created_s=manifest.created_s, bytes=size)
        return self._known[version]

    def _manifest_path(self, version: PolicyVersion) -> Path:
        return self._manifests / f"{version}.json"

    def _stored_versions(self) -> list[PolicyVersion]:
        return sorted(int(path.stem) for path in self._manifests.glob("*.json"))

    def _deleted_total(self) -> int:
        try:
            return int((self.directory / "deleted_total").read_text())
        except FileNotFoundError:
            return 0

    def _collect(self) -> None:
        """Delete versions beyond retention, then the blobs that no kept version names: pointers first, data last."""
        versions = self._stored_versions()
        pinned = self._pinned_versions() & set(versions)
        kept = sorted(pinned | set(versions[-self._settings.keep_versions :]))
        for version in [version for version in kept[:-1] if version not in pinned]:
            if self._named_bytes(kept) > self._settings.max_bytes:
                kept.remove(version)
        dropped = [version for version in versions if version not in kept]
        retired = {payload.sha256 for version in dropped for payload in self.manifest(version).payloads}
        named = {payload.sha256 for version in kept for payload in self.manifest(version).payloads}
        if dropped:
            self._replace(self.directory / "deleted_total", str(self._deleted_total() + len(dropped)).encode())
        for version in dropped:
            self._manifest_path(version).unlink()
        expired_s = self._clock() - self._settings.orphan_age_s
        for directory in (self._blobs, self._incoming):
            for entry in os.scandir(directory):
                if entry.name not in named and (entry.name in retired or entry.stat().st_mtime < expired_s):
                    Path(entry.path).unlink(missing_ok=True)

    def _pinned_versions(self) -> set[PolicyVersion]:
        return {int(path.name) for path in self._pinned.iterdir()}

    def _named_bytes(self, versions: Iterable[PolicyVersion]) -> int:
        named = {payload.sha256: payload.size_bytes for v in versions for payload in self.manifest(v).payloads}
        return sum(named.values())

    def _bytes_in_use(self) -> int:
        """Bytes that a commit will not free: the latest version's, and those of uploads that no version names yet."""
        stays = {self.latest_version(), *self._pinned_versions()}
        versions = [version for version in self._stored_versions() if version <= self.latest_version()]
        older = {p.sha256 for v in versions if v not in stays for p in self.manifest(v).payloads}
        needed = {p.sha256 for v in versions if v in stays for p in self.manifest(v).payloads}
        return sum(e.stat().st_size for e in os.scandir(self._blobs) if e.name in needed or e.name not in older)

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


def _commit(file: BinaryIO, path: Path) -> None:
    """Make a written file appear under its name in one step that survives power loss."""
    file.flush()
    os.fsync(file.fileno())
    Path(file.name).replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"the weight store meets a disk error: {error}", hint="check the disk") from error
