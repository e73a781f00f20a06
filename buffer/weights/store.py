"""The weight store protocol: blobs first, the manifest as the commit."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, Protocol

from pydantic import Field, field_validator

from buffer.settings import Settings
from buffer.types import PolicyVersion, Record
from buffer.weights.manifest import Manifest, Payload

CHUNK_BYTES: Final = 4 << 20
"""Of a payload at a time: smaller ones cost more in calls than they save in memory."""


class WeightStoreSettings(Settings):
    """Where published versions are, how many are served, and how soon rubbish goes."""

    store: str = "directory"
    """`directory`: runs/NAME/weights on the service's disk. `s3://bucket/prefix`: S3-compatible object storage, each
    run below prefix/NAME. Credentials come from the environment alone (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN, or the role of the machine). Needs the extra `s3`."""
    s3_endpoint: str | None = None
    """URL of an object storage that is not Amazon's, such as https://minio:9000. None = Amazon's of the region."""
    s3_region: str | None = None
    """Region of the bucket. None = AWS_REGION, else us-east-1, which most other vendors take."""
    s3_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that object storage may stay away, retries included, before the caller gets 503; clients try again."""
    keep_versions: Annotated[int, Field(ge=1)] = 4
    """Newest versions kept; an actor that downloads an older one finds it gone and asks for the latest."""
    max_bytes: Annotated[int, Field(ge=1)] = 256 << 30
    """Room for payloads. Over it the oldest versions go first, but never the latest nor a pinned one (evaluation's
    best): an upload that does not fit beside them is refused. 256 GiB hold four bfloat16 keyframes of a 32 B model."""
    orphan_age_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which an upload that no version names is deleted; longer than any upload takes."""
    poll_s: Annotated[float, Field(gt=0)] = 0.02
    """Seconds between two looks for a newer version while someone waits for one, however many wait. In object storage
    each is a request that some vendors bill: 0.5 there makes 7,200 an hour of them."""

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str) -> str:
        if store != "directory" and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?", store):
            raise ValueError(f"want directory or s3://bucket/prefix{_seen(store)}")
        return store

    @field_validator("s3_endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(r"https?://[^/@?#\s]+", endpoint):
            raise ValueError(f"want http://host:port or https://host, without a path{_seen(endpoint)}")
        return endpoint


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


class ServedWeightStore(WeightStore, Protocol):
    """A weight store as the service serves it. Threads and processes may share what is behind it."""

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def poll_s(self) -> float:
        """Seconds between two calls of `latest_version` by whoever waits for a newer one."""
        ...

    def latest_version(self) -> PolicyVersion:
        """Return the latest published version; -1 before the first. Looks every time."""
        ...

    def blob_bytes(self, sha256: str) -> int:
        """Return the size of a payload. Raises NotFound."""
        ...

    def blob_range(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """Stream bytes [start, stop) of a payload in chunks of about CHUNK_BYTES. Raises NotFound at the first one."""
        ...

    def pin(self, version: PolicyVersion) -> None:
        """Keep a stored version until it is unpinned, whatever retention says. Raises NotFound."""
        ...

    def unpin(self, version: PolicyVersion) -> None:
        """Let the next publication's retention take a version; one that is not pinned stays as it is."""
        ...

    def status(self) -> WeightsStatus:
        """Return what is published and how much room it takes."""
        ...


def _seen(url: str) -> str:
    """Return the end of a sentence that refuses a URL: a password in it is not repeated."""
    return ", and credentials in the environment alone" if "@" in url else f", got {url}"


def write_chunks(chunks: Iterable[bytes], path: Path) -> None:
    """Write chunks to a file: a `download` for stores that only stream."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
