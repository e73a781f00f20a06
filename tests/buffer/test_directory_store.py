"""Published weights in a directory: whole or absent, whatever dies."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from buffer.errors import Conflict, CorruptWeights, NotFound, RunMismatch, StalewiseError, StoreUnavailable
from buffer.weights.directory_store import DirectoryWeightStore, WeightStoreSettings
from buffer.weights.manifest import Manifest
from buffer.weights.store import PublishedVersion, WeightsStatus
from tests.conftest import Clock
from tests.factories import make_manifest


def publish(store: DirectoryWeightStore, version: int) -> Manifest:
    payload = f"payload of {version}".encode()
    manifest = make_manifest(version, payload=payload)
    store.put_blob(manifest.payloads[0].sha256, [payload[:3], payload[3:]])
    store.publish(manifest)
    return manifest


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_published_version_comes_back_byte_for_byte(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path)
    manifest = publish(store, 3)

    again = DirectoryWeightStore(tmp_path)

    latest = again.latest()
    assert latest is not None
    assert latest.model_dump_json() == manifest.model_dump_json()
    assert b"".join(again.blob(manifest.payloads[0].sha256)) == b"payload of 3"
    assert again.latest(after=3) is None


def test_wrong_hash_leaves_nothing(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path)

    with pytest.raises(CorruptWeights, match="the payload has the hash 2d711642"):
        store.put_blob("0" * 64, [b"x"])

    assert files(tmp_path) == []


def test_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise CorruptWeights("the sender hung up")

    with pytest.raises(CorruptWeights):
        DirectoryWeightStore(tmp_path).put_blob("0" * 64, broken())

    assert files(tmp_path) == []


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
    tmp_path: Path, manifest: Manifest, error: type[StalewiseError], sentence: str
) -> None:
    store = DirectoryWeightStore(tmp_path)
    publish(store, 5)

    with pytest.raises(error) as caught:
        store.publish(manifest)

    assert caught.value.detail == sentence
    assert store.status().versions == [5]


def test_same_manifest_again_is_harmless(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path)
    manifest = publish(store, 5)

    store.publish(manifest)

    assert store.status().versions == [5]


def test_retention_keeps_the_newest_versions_and_only_their_payloads(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=2))
    manifests = [publish(store, version) for version in (0, 1, 3, 7)]

    described = [PublishedVersion(version=m.version, created_s=m.created_s, bytes=12) for m in manifests[2:]]
    assert store.status() == WeightsStatus(
        latest_version=7, versions=[3, 7], published=described, bytes=24, deleted_total=2
    )
    kept = {f"blobs/{manifest.payloads[0].sha256}" for manifest in manifests[2:]}
    assert set(files(tmp_path)) == {
        "LATEST",
        "deleted_total",
        "lock",
        "manifests/3.json",
        "manifests/7.json",
        *kept,
    }
    with pytest.raises(NotFound, match="version 1 is not stored"):
        store.manifest(1)


def test_payload_that_two_versions_share_outlives_the_older_one(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=1))
    shared = make_manifest(0)
    store.put_blob(shared.payloads[0].sha256, [b"not really tensors"])
    store.publish(shared)

    store.publish(make_manifest(1))

    assert b"".join(store.blob(shared.payloads[0].sha256)) == b"not really tensors"


def test_upload_that_no_version_names_goes_after_a_while(tmp_path: Path, clock: Clock) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(orphan_age_s=60), clock=clock)
    orphan = sha256(b"orphan").hexdigest()
    store.put_blob(orphan, [b"orphan"])
    os.utime(tmp_path / "blobs" / orphan, (clock.now_s, clock.now_s))

    clock.advance(59)
    publish(store, 0)
    young = (tmp_path / "blobs" / orphan).exists()
    clock.advance(2)
    publish(store, 1)

    assert (young, (tmp_path / "blobs" / orphan).exists()) == (True, False)


_KILLED_AT = """
import os, signal, sys
from pathlib import Path
import buffer.weights.directory_store as module
from tests.factories import make_manifest

store = module.DirectoryWeightStore(Path(sys.argv[1]))
renames = 0
real = Path.replace
def replace(self, target):
    global renames
    renames += 1
    if renames == int(sys.argv[2]):
        if sys.argv[3] == "after":
            real(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
manifest = make_manifest(1, payload=b"payload of 1")
store.put_blob(manifest.payloads[0].sha256, [b"payload of 1"])
store.publish(manifest)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3])
def test_kill_around_each_rename_leaves_one_whole_version_and_the_next_publication_works(
    tmp_path: Path, rename: int, moment: str
) -> None:
    """Renames of one publication, in order: blob, manifest, LATEST. Only the last one commits."""
    publish(DirectoryWeightStore(tmp_path), 0)

    killed = subprocess.run([sys.executable, "-c", _KILLED_AT, tmp_path, str(rename), moment], check=False)

    store = DirectoryWeightStore(tmp_path)
    latest = store.latest()
    assert killed.returncode == -9
    assert latest is not None
    assert latest.version == (1 if (rename, moment) == (3, "after") else 0)
    assert b"".join(store.blob(latest.payloads[0].sha256)) == f"payload of {latest.version}".encode()
    with pytest.raises(NotFound):
        store.manifest(latest.version + 1)
    publish(store, 2)
    assert store.status().versions == ([0, 1, 2] if latest.version else [0, 2])


def test_waiting_for_a_version_ends_with_it(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path)
    publish(store, 0)
    publisher = threading.Timer(0.2, publish, (DirectoryWeightStore(tmp_path), 1))
    publisher.start()

    latest = store.latest(after=0, wait_s=60)
    publisher.join()

    assert latest is not None
    assert latest.version == 1


def damage_manifest(directory: Path) -> None:
    (directory / "manifests" / "0.json").write_text("{")


def lose_manifest(directory: Path) -> None:
    (directory / "manifests" / "0.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"), [(damage_manifest, "0.json is damaged"), (lose_manifest, "has lost its latest version 0")]
)
def test_damaged_store_says_so(tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    store = DirectoryWeightStore(tmp_path)
    publish(store, 0)
    damage(tmp_path)

    with pytest.raises(StoreUnavailable, match=sentence):
        store.latest()


def test_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreUnavailable, match=r"the weight store meets a disk error: .*Not a directory"):
        DirectoryWeightStore(tmp_path / "file" / "weights")


def sized(version: int, size: int) -> tuple[Manifest, bytes]:
    payload = bytes([version]) * size
    return make_manifest(version, payload=payload), payload


def test_a_full_disk_costs_the_oldest_versions_and_never_the_latest(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=4, max_bytes=100))
    for version, size in ((0, 30), (1, 30), (2, 60)):
        manifest, payload = sized(version, size)
        store.put_blob(manifest.payloads[0].sha256, [payload])
        store.publish(manifest)
    assert (store.status().versions, store.status().bytes, store.status().deleted_total) == ([1, 2], 90, 1)

    manifest, payload = sized(3, 41)
    with pytest.raises(StoreUnavailable, match=r"weights\.max_bytes=100"):
        store.put_blob(manifest.payloads[0].sha256, [payload[:40], payload[40:]])

    assert store.status().versions == [1, 2]
    assert not list((tmp_path / "incoming").iterdir())
    manifest, payload = sized(3, 40)
    store.put_blob(manifest.payloads[0].sha256, [payload])
    store.publish(manifest)
    assert (store.status().versions, store.status().deleted_total) == ([2, 3], 2)


def test_a_full_disk_costs_no_pinned_version(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=4, max_bytes=100))
    for version in range(4):
        manifest, payload = sized(version, 30)
        store.put_blob(manifest.payloads[0].sha256, [payload])
        store.publish(manifest)
        if version == 0:
            store.pin(0)
    assert (store.status().versions, store.status().bytes) == ([0, 2, 3], 90)

    manifest, payload = sized(4, 41)
    with pytest.raises(StoreUnavailable, match=r"weights\.max_bytes=100"):
        store.put_blob(manifest.payloads[0].sha256, [payload])

    store.unpin(0)
    store.put_blob(manifest.payloads[0].sha256, [payload])
    store.publish(manifest)
    assert store.status().versions == [3, 4]
