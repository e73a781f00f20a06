"""A weight store in a dictionary, with real behaviour, and what publishing to it needs."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from buffer.errors import Conflict, NotFound
from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.mirror import Mirror
from buffer.weights.store import WeightStore, write_chunks
from learner.distributed import ALONE, Ranks
from learner.publisher import Publisher
from learner.snapshot import Snapshot


class ListedStore:
    """Keeps everything, lists what happened in order, and tells `published` of each new version."""

    def __init__(self, published: Callable[[PolicyVersion], None] = lambda version: None) -> None:
        self.events: list[str] = []
        self.manifests: dict[PolicyVersion, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self._published = published

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        self.blobs[sha256] = b"".join(chunks)
        self.events.append(f"blob {sha256}")

    def publish(self, manifest: Manifest) -> None:
        latest = self.latest()
        if latest is not None and manifest.model_dump_json() == latest.model_dump_json():
            return
        if manifest.version <= max(self.manifests, default=-1):
            raise Conflict(f"version {manifest.version} is not above the latest one")
        if any(payload.sha256 not in self.blobs for payload in manifest.payloads):
            raise NotFound("a blob is missing")
        self.manifests[manifest.version] = manifest
        self.events.append(f"manifest {manifest.version}")
        self._published(manifest.version)

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        newest = max(self.manifests, default=-1)
        return self.manifests[newest] if newest > after else None

    def manifest(self, version: PolicyVersion) -> Manifest:
        if version not in self.manifests:
            raise NotFound(f"there is no version {version}")
        return self.manifests[version]

    def blob(self, sha256: str) -> Iterable[bytes]:
        if sha256 not in self.blobs:
            raise NotFound(f"there is no blob {sha256}")
        return [self.blobs[sha256]]

    def download(self, payload: Payload, path: Path) -> None:
        write_chunks(self.blob(payload.sha256), path)


class AtOnce(Executor):
    """Runs a job where it is submitted, so that a test sees every version published before it goes on."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 as any executor: whoever asks for the result gets it
            future.set_exception(error)
        return future


def publisher_to(
    store: WeightStore,
    *,
    run_id: str = "run",
    keyframe_every: int = 20,
    executor: Executor | None = None,
    ranks: Ranks = ALONE,
) -> Publisher:
    """Return a publisher at a time that stands still."""
    return Publisher(
        store,
        run_id=run_id,
        model_fingerprint="f" * 64,
        keyframe_every=keyframe_every,
        executor=executor or AtOnce(),
        unix_time=lambda: 12.0,
        ranks=ranks,
    )


def keyframe_of(snapshot: Snapshot) -> bytes:
    """Return a snapshot as the file that would be published."""
    mirror = Mirror.allocate(snapshot.specs)
    mirror.advance(snapshot.tensors, 0)
    return b"".join(mirror.keyframe())
