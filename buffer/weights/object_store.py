"""Published weights in S3-compatible object storage: one small object changes, by compare-and-swap.

blobs/<sha256>   payloads, immutable; an upload is whole or absent
INDEX            the committed manifests, the pins and the counter; its replacement is the commit

A writer replaces the INDEX only if it is still the one that it read (If-Match), and looks again where it is not: so any
number of services may share a bucket, and a version is committed at once or not at all. What a killed upload leaves is
invisible, but stored: let a lifecycle rule of the bucket abort incomplete multipart uploads.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store
from pydantic import Field, ValidationError

from buffer.errors import StoreUnavailable
from buffer.types import PolicyVersion, Record
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.retention import (
    StoredBlob,
    absent_blob,
    absent_version,
    check_publication,
    described,
    kept_versions,
    named_blobs,
    occupied_bytes,
    proven,
    rubbish,
)
from buffer.weights.store import CHUNK_BYTES, WeightsStatus, WeightStoreSettings, write_chunks

if TYPE_CHECKING:
    from obstore.store import S3Config

_INDEX: Final = "INDEX"
_PART_BYTES: Final = 16 << 20  # of an upload: 10,000 of them, which S3 allows, are 160 GB
_PARTS_AT_ONCE: Final = 4
_SWAPS: Final = 20  # attempts to replace the index before others are said to be in the way
_RETRIES: Final = 5
_METADATA: Final = "//169.254.169.254/"  # where a machine in a cloud asks for its role: the last resort for credentials
_REQUEST: Final = timedelta(hours=1)  # the longest: payloads stream; one that stalls ends by the read timeout


class Index(Record):
    """All that is committed."""

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    manifests: Annotated[tuple[Manifest, ...], Field(strict=False)] = ()
    """Oldest first: the last one is the version that is served."""
    pinned: Annotated[tuple[PolicyVersion, ...], Field(strict=False)] = ()
    """Versions that retention leaves alone."""
    deleted_total: int = 0
    """Versions removed by retention, all time."""

    @property
    def latest(self) -> Manifest | None:
        """The version that is served."""
        return self.manifests[-1] if self.manifests else None

    @property
    def latest_version(self) -> PolicyVersion:
        """Its number; -1 before the first."""
        return self.manifests[-1].version if self.manifests else -1

    def by_version(self) -> dict[PolicyVersion, Manifest]:
        """Return the manifests by version."""
        return {manifest.version: manifest for manifest in self.manifests}


class ObjectWeightStore:
    """A ServedWeightStore in a bucket. Threads, processes and machines may share it."""

    def __init__(self, prefix: str, *, settings: WeightStoreSettings, clock: Callable[[], float] = time.time) -> None:
        """Open what `settings.store` names, below `prefix`. Nothing is asked of the bucket yet."""
        bucket, _, path = settings.store.removeprefix("s3://").partition("/")
        self._settings = settings
        self._clock = clock
        self._location = f"s3://{bucket}/" + "/".join(part for part in (path.strip("/"), prefix) if part)
        self._objects = _open(bucket, self._location.removeprefix(f"s3://{bucket}/"), settings)
        self._seen: tuple[str, Index] | None = None  # the newest INDEX with its ETag

    @property
    def location(self) -> str:
        """See ServedWeightStore."""
        return self._location

    @property
    def poll_s(self) -> float:
        """See ServedWeightStore."""
        return self._settings.poll_s

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """See WeightStore. The upload becomes visible once its hash is proven."""
        index, _ = self._read()
        max_bytes = self._settings.max_bytes
        with self._errors():
            room = max_bytes - occupied_bytes(self._stored(), index.by_version(), set(index.pinned))
            upload = proven(chunks, sha256=sha256, room_bytes=room, max_bytes=max_bytes)
            obstore.put(self._objects, _blob(sha256), upload, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    def publish(self, manifest: Manifest) -> None:
        """See WeightStore."""

        def committed(index: Index) -> Index:
            if index.latest is not None and manifest.model_dump_json() == index.latest.model_dump_json():
                return index
            check_publication(manifest, index.latest, self.blob_bytes)
            manifests = index.by_version() | {manifest.version: manifest}
            kept = kept_versions(manifests, set(index.pinned), self._settings)
            dropped = len(manifests) - len(kept)
            return Index(
                manifests=tuple(manifests[version] for version in kept),
                pinned=index.pinned,
                deleted_total=index.deleted_total + dropped,
            )

        before, after = self._swap(committed)
        if after is not before:
            self._collect(before, after)

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        """See WeightStore."""
        deadline = time.monotonic() + wait_s
        while True:
            index, _ = self._read()
            if index.latest_version > after:
                return index.latest
            if time.monotonic() >= deadline:
                return None
            time.sleep(self._settings.poll_s)

    def latest_version(self) -> PolicyVersion:
        """See ServedWeightStore."""
        return self._read()[0].latest_version

    def manifest(self, version: PolicyVersion) -> Manifest:
        """See WeightStore."""
        manifest = self._read()[0].by_version().get(version)
        if manifest is None:
            raise absent_version(version, self._settings.keep_versions)
        return manifest

    def blob(self, sha256: str) -> Iterator[bytes]:
        """See WeightStore."""
        return self.blob_range(sha256, 0, self.blob_bytes(sha256))

    def download(self, payload: Payload, path: Path) -> None:
        """See WeightStore."""
        write_chunks(self.blob(payload.sha256), path)

    def blob_bytes(self, sha256: str) -> int:
        """See ServedWeightStore."""
        with self._errors():
            try:
                return obstore.head(self._objects, _blob(sha256))["size"]
            except FileNotFoundError:
                raise absent_blob(sha256) from None

    def blob_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See ServedWeightStore."""
        if start == stop:
            return
        with self._errors():
            try:
                answer = obstore.get(self._objects, _blob(sha256), options={"range": (start, stop)})
            except FileNotFoundError:
                raise absent_blob(sha256) from None
            for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def pin(self, version: PolicyVersion) -> None:
        """See ServedWeightStore."""

        def pinned(index: Index) -> Index:
            if version not in index.by_version():
                raise absent_version(version, self._settings.keep_versions)
            if version in index.pinned:
                return index
            return index.model_copy(update={"pinned": (*index.pinned, version)})

        self._swap(pinned)

    def unpin(self, version: PolicyVersion) -> None:
        """See ServedWeightStore."""

        def unpinned(index: Index) -> Index:
            if version not in index.pinned:
                return index
            return index.model_copy(update={"pinned": tuple(v for v in index.pinned if v != version)})

        self._swap(unpinned)

    def status(self) -> WeightsStatus:
        """See ServedWeightStore. Uploads that no version names are not counted: pollers ask every second."""
        index, _ = self._read()
        return WeightsStatus(
            latest_version=index.latest_version,
            versions=[manifest.version for manifest in index.manifests],
            published=[described(manifest) for manifest in index.manifests],
            bytes=sum(named_blobs(index.manifests).values()),
            deleted_total=index.deleted_total,
        )

    def _read(self) -> tuple[Index, str | None]:
        """Return the index, an empty one before the first, and its ETag; it is sent only if it has changed."""
        seen = self._seen
        with self._errors():
            try:
                answer = obstore.get(self._objects, _INDEX, options={"if_none_match": seen[0]} if seen else {})
                e_tag, content = answer.meta["e_tag"], bytes(answer.bytes())
            except NotModifiedError:
                assert seen is not None, "only a conditional request is answered so"
                return seen[1], seen[0]
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return Index(), None
        if e_tag is None:
            raise StoreUnavailable(f"{self._location} has no ETags, without which nothing can be committed")
        try:
            index = Index.model_validate_json(content)
        except ValidationError as error:
            raise StoreUnavailable(
                f"{self._location}/{_INDEX} is damaged", hint="restore it, or remove all below it"
            ) from error
        self._seen = e_tag, index
        return index, e_tag

    def _swap(self, change: Callable[[Index], Index]) -> tuple[Index, Index]:
        """Replace the index by a change of it, and return both; a change that returns its argument writes nothing."""
        for _ in range(_SWAPS):
            before, e_tag = self._read()
            after = change(before)
            if after is before:
                return before, before
            content = after.model_dump_json(by_alias=True).encode()
            with self._errors():
                try:
                    obstore.put(self._objects, _INDEX, content, mode="create" if e_tag is None else {"e_tag": e_tag})
                except (AlreadyExistsError, PreconditionError):
                    continue  # somebody else was faster, or our own first attempt was, whose answer was lost
            return before, after
        raise StoreUnavailable(f"{self._location}/{_INDEX} changes faster than it can be replaced", hint="try again")

    def _collect(self, before: Index, after: Index) -> None:
        """Delete the blobs that no kept version names, once the index that dropped them is committed."""
        kept = after.by_version()
        dropped = [manifest for manifest in before.manifests if manifest.version not in kept]
        expired_s = self._clock() - self._settings.orphan_age_s
        with self._errors():
            names = rubbish(self._stored(), kept=after.manifests, dropped=dropped, expired_s=expired_s)
            if names:
                obstore.delete(self._objects, [_blob(name) for name in names])

    def _stored(self) -> Iterator[StoredBlob]:
        for page in obstore.list(self._objects, prefix=_blob("")):
            for meta in page:
                name = meta["path"].rpartition("/")[2]
                yield StoredBlob(name, meta["size"], meta["last_modified"].timestamp())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the storage answers into one sentence each."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreUnavailable(
                f"{self._location} refuses the credentials: {_reason(error)}",
                hint="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role of the machine, must allow to list the"
                " bucket and to get, put and delete objects",
            ) from error
        except FileNotFoundError as error:
            raise StoreUnavailable(
                f"{self._location} cannot be used: the bucket does not exist", hint="create it, or set weights.store"
            ) from error
        except BaseError as error:
            raise StoreUnavailable(
                f"{self._location} at {self._settings.s3_endpoint or 'Amazon'} cannot be used: {_reason(error)}",
                hint="check weights.s3_endpoint, weights.s3_region, the network and the credentials",
            ) from error


def _open(bucket: str, prefix: str, settings: WeightStoreSettings) -> S3Store:
    """Return the bucket; obstore takes the credentials, and what is not set here, from the environment."""
    patience = timedelta(seconds=settings.s3_timeout_s)
    config: S3Config = {}
    if settings.s3_endpoint is not None:
        config["endpoint"] = settings.s3_endpoint
    if settings.s3_region is not None:
        config["region"] = settings.s3_region
    return S3Store(
        bucket,
        prefix=prefix,
        config=config,
        client_options={
            "allow_http": (settings.s3_endpoint or "").startswith("http:"),
            "connect_timeout": patience,
            "read_timeout": patience,
            "timeout": _REQUEST,
        },
        retry_config={"max_retries": _RETRIES, "retry_timeout": patience},
    )


def _blob(sha256: str) -> str:
    return f"blobs/{sha256}"


def _reason(error: BaseError) -> str:
    """Return what S3 calls an error, else what its first line says; the rest is for who debugs the library."""
    text = str(error)
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code.group(1)
    first = text.partition("\n")[0]
    if _METADATA in first:
        return "there are no credentials, neither in the environment nor by a role of the machine"
    return first.rpartition(" - ")[2].strip()
