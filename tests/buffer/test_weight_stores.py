"""What every weight store promises, on a disk and in object storage: whole or absent, whatever dies."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import pytest

from buffer.errors import Conflict, CorruptWeights, NotFound, RunMismatch, StalewiseError, StoreUnavailable
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.manifest import Manifest
from buffer.weights.object_store import ObjectWeightStore
from buffer.weights.store import PublishedVersion, ServedWeightStore, WeightsStatus, WeightStoreSettings
from tests.conftest import Clock
from tests.factories import RUN_ID, make_manifest
from tests.object_storage import BUCKET, CREDENTIALS


@dataclass(frozen=True)
class Place:
    """Where a test's store is; it may be opened many times."""

    directory: Path
    settings: WeightStoreSettings

    def open(self, clock: Callable[[], float] = time.time, **settings: float) -> ServedWeightStore:
        changed = self.settings.model_copy(update=settings)
        if changed.store == "directory":
            return DirectoryWeightStore(self.directory, settings=changed, clock=clock)
        return ObjectWeightStore(RUN_ID, settings=changed, clock=clock)


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "directory":
        return Place(tmp_path, WeightStoreSettings(poll_s=0.01))
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings = WeightStoreSettings(
        store=f"s3://{BUCKET}/{uuid4().hex}", s3_endpoint=request.getfixturevalue("s3_url"), poll_s=0.01
    )
    return Place(tmp_path, settings)


def put(store: ServedWeightStore, payload: bytes) -> str:
    name = sha256(payload).hexdigest()
    store.put_blob(name, [payload[:3], payload[3:]])
    return name


def publish(store: ServedWeightStore, version: int, payload: bytes | None = None) -> Manifest:
    payload = payload or f"payload of {version}".encode()
    manifest = make_manifest(version, payload=payload)
    put(store, payload)
    store.publish(manifest)
    return manifest


def is_stored(store: ServedWeightStore, payload: bytes) -> bool:
    try:
        return store.blob_bytes(sha256(payload).hexdigest()) == len(payload)
    except NotFound:
        return False


def test_published_version_comes_back_byte_for_byte(place: Place) -> None:
    manifest = publish(place.open(), 3)

    again = place.open()

    latest = again.latest()
    assert latest is not None
    assert latest.model_dump_json() == manifest.model_dump_json()
    assert again.manifest(3).model_dump_json() == manifest.model_dump_json()
    assert b"".join(again.blob(manifest.payloads[0].sha256)) == b"payload of 3"
    assert (again.latest_version(), again.latest(after=3)) == (3, None)


def test_nothing_is_published_in_a_new_store(place: Place) -> None:
    store = place.open()

    assert (store.latest_version(), store.latest()) == (-1, None)
    assert store.status() == WeightsStatus(latest_version=-1, versions=[], published=[], bytes=0, deleted_total=0)
    with pytest.raises(NotFound, match="version 0 is not stored"):
        store.manifest(0)
    with pytest.raises(NotFound, match=f"blob {'0' * 64} is not stored"):
        store.blob_bytes("0" * 64)


def test_a_payload_of_many_parts_comes_back_in_any_range(place: Place, tmp_path: Path) -> None:
    store = place.open()
    block = bytes(range(256)) * 4096  # 1 MiB: a part of an upload to object storage has 16
    name = sha256(block * 20).hexdigest()

    store.put_blob(name, iter([block] * 20))

    assert store.blob_bytes(name) == 20 << 20
    assert b"".join(store.blob(name)) == block * 20
    crossing = b"".join(store.blob_range(name, (16 << 20) - 5, (16 << 20) + 9_000_000))
    assert crossing == (block * 20)[(16 << 20) - 5 : (16 << 20) + 9_000_000]
    manifest = make_manifest(0, payload=block * 20)
    store.download(manifest.payloads[0], tmp_path / "payload")
    assert (tmp_path / "payload").read_bytes() == block * 20


def test_wrong_hash_leaves_nothing(place: Place) -> None:
    store = place.open()

    with pytest.raises(CorruptWeights, match="the payload has the hash 2d711642"):
        store.put_blob("0" * 64, [b"x"])

    with pytest.raises(NotFound):
        store.blob_bytes("0" * 64)


def test_upload_that_breaks_off_leaves_nothing(place: Place) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half" * 5_000_000
        raise CorruptWeights("the sender hung up")

    store = place.open()
    with pytest.raises(CorruptWeights, match="the sender hung up"):
        store.put_blob("0" * 64, broken())

    with pytest.raises(NotFound):
        store.blob_bytes("0" * 64)


@pytest.mark.parametrize(
    ("manifest", "error", "sentence"),
    [
        (make_manifest(4, payload=b"payload of 5"), Conflict, "version 4 is not above the latest published one, 5"),
        (make_manifest(5, payload=b"other"), Conflict, "version 5 is not above the latest published one, 5"),
        (make_manifest(6, payload=b"absent"), NotFound, f"blob {sha256(b'absent').hexdigest()} is not stored"),
        (make_manifest(6, run_id="other"), RunMismatch, "the version is of run other, the store holds run test-run"),
        (
            make_manifest(6).model_copy(update={"model_fingerprint": "f" * 64}),
            RunMismatch,
            f"the version is of model {'f' * 64}, the store holds {make_manifest(6).model_fingerprint}",
        ),
    ],
)
def test_version_that_does_not_follow_is_refused_and_the_latest_stays(
    place: Place, manifest: Manifest, error: type[StalewiseError], sentence: str
) -> None:
    store = place.open()
    publish(store, 5)

    with pytest.raises(error) as caught:
        store.publish(manifest)

    assert caught.value.detail == sentence
    assert store.status().versions == [5]


def test_same_manifest_again_is_harmless(place: Place) -> None:
    store = place.open()
    manifest = publish(store, 5)

    place.open().publish(manifest)

    assert store.status().versions == [5]


def test_of_two_publishers_of_one_version_one_wins_and_the_other_learns_it(place: Place) -> None:
    """Both look before either commits: as two services that share a bucket, or two workers that share a directory."""
    payloads = [f"payload of publisher {number}".encode() for number in range(4)]
    stores = [place.open() for _ in payloads]
    for store, payload in zip(stores, payloads, strict=True):
        put(store, payload)
    start, outcomes = threading.Barrier(len(stores)), []

    def race(store: ServedWeightStore, payload: bytes) -> None:
        start.wait()
        try:
            store.publish(make_manifest(0, payload=payload))
            outcomes.append(payload)
        except Conflict:
            outcomes.append(b"")

    threads = [threading.Thread(target=race, args=pair) for pair in zip(stores, payloads, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [payload for payload in outcomes if payload]
    assert outcomes.count(b"") == 3
    assert all(b"".join(store.blob(store.manifest(0).payloads[0].sha256)) == winner for store in stores)


def test_retention_keeps_the_newest_versions_and_only_their_payloads(place: Place) -> None:
    store = place.open(keep_versions=2)
    manifests = [publish(store, version) for version in (0, 1, 3, 7)]

    described = [PublishedVersion(version=m.version, created_s=m.created_s, bytes=12) for m in manifests[2:]]
    assert store.status() == WeightsStatus(
        latest_version=7, versions=[3, 7], published=described, bytes=24, deleted_total=2
    )
    assert [is_stored(store, f"payload of {version}".encode()) for version in (0, 1, 3, 7)] == [
        False,
        False,
        True,
        True,
    ]
    with pytest.raises(NotFound, match="version 1 is not stored"):
        store.manifest(1)


def test_payload_that_two_versions_share_outlives_the_older_one(place: Place) -> None:
    store = place.open(keep_versions=1)
    shared = publish(store, 0, b"not really tensors")

    store.publish(make_manifest(1))

    assert b"".join(store.blob(shared.payloads[0].sha256)) == b"not really tensors"


def test_upload_that_no_version_names_goes_after_a_while(place: Place, clock: Clock) -> None:
    clock.now_s = time.time()
    store = place.open(clock, orphan_age_s=600)
    put(store, b"orphan")

    publish(store, 0)
    young = is_stored(store, b"orphan")
    clock.advance(700)
    publish(store, 1)

    assert (young, is_stored(store, b"orphan")) == (True, False)


def test_waiting_for_a_version_ends_with_it(place: Place) -> None:
    store = place.open()
    publish(store, 0)
    publisher = threading.Timer(0.2, publish, (place.open(), 1))
    publisher.start()

    latest = store.latest(after=0, wait_s=60)
    publisher.join()

    assert latest is not None
    assert latest.version == 1


def test_a_full_store_costs_the_oldest_versions_and_never_the_latest(place: Place) -> None:
    store = place.open(max_bytes=100)
    for version, size in ((0, 30), (1, 30), (2, 60)):
        publish(store, version, bytes([version]) * size)
    assert (store.status().versions, store.status().bytes, store.status().deleted_total) == ([1, 2], 90, 1)

    with pytest.raises(StoreUnavailable, match=r"weights\.max_bytes=100"):
        put(store, bytes([3]) * 41)

    assert store.status().versions == [1, 2]
    assert not is_stored(store, bytes([3]) * 41)
    publish(store, 3, bytes([3]) * 40)
    assert (store.status().versions, store.status().deleted_total) == ([2, 3], 2)


def test_a_full_store_costs_no_pinned_version(place: Place) -> None:
    store = place.open(max_bytes=100)
    for version in range(4):
        publish(store, version, bytes([version]) * 30)
        if version == 0:
            store.pin(0)
    assert (store.status().versions, store.status().bytes) == ([0, 2, 3], 90)

    with pytest.raises(StoreUnavailable, match=r"weights\.max_bytes=100"):
        put(store, bytes([4]) * 41)

    store.unpin(0)
    publish(store, 4, bytes([4]) * 41)
    assert store.status().versions == [3, 4]
    with pytest.raises(NotFound, match="version 0 is not stored"):
        store.pin(0)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from buffer.weights.open_store import open_weight_store
from buffer.weights.store import WeightStoreSettings
from tests.factories import RUN_ID, make_manifest

store = open_weight_store(WeightStoreSettings(**json.loads(sys.argv[1])), Path(sys.argv[2]), RUN_ID)
payload = b"payload of 1" * 2_000_000
manifest = make_manifest(1, payload=payload)

def upload():
    yield payload[:-1]
    if sys.argv[3] == "upload":
        os.kill(os.getpid(), signal.SIGKILL)
    yield payload[-1:]

store.put_blob(manifest.payloads[0].sha256, upload())
if sys.argv[3] == "publish":
    os.kill(os.getpid(), signal.SIGKILL)
store.publish(manifest)
"""


@pytest.mark.parametrize("moment", ["upload", "publish"])
def test_a_killed_publisher_leaves_the_version_before_and_the_next_one_works(place: Place, moment: str) -> None:
    store = place.open()
    publish(store, 0)
    settings = json.dumps(place.settings.model_dump(mode="json"))

    killed = subprocess.run([sys.executable, "-c", _KILLED, settings, place.directory, moment], check=False)

    assert killed.returncode == -9
    assert (store.latest_version(), store.status().versions) == (0, [0])
    assert b"".join(store.blob(store.manifest(0).payloads[0].sha256)) == b"payload of 0"
    assert is_stored(store, b"payload of 1" * 2_000_000) == (moment == "publish")
    publish(store, 1)
    assert store.status().versions == [0, 1]
