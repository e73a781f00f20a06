"""What only the weight store in a directory has: renames, and files that somebody else may damage."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.errors import CorruptWeights, NotFound, StoreUnavailable
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.manifest import Manifest
from buffer.weights.store import WeightStoreSettings
from tests.factories import make_manifest


def publish(store: DirectoryWeightStore, version: int) -> Manifest:
    payload = f"payload of {version}".encode()
    manifest = make_manifest(version, payload=payload)
    store.put_blob(manifest.payloads[0].sha256, [payload[:3], payload[3:]])
    store.publish(manifest)
    return manifest


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_what_is_refused_leaves_no_file(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path)

    with pytest.raises(CorruptWeights):
        store.put_blob("0" * 64, [b"x"])

    assert set(files(tmp_path)) <= {"lock"}


def test_retention_leaves_the_files_of_what_is_kept(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=2))
    manifests = [publish(store, version) for version in (0, 1, 3, 7)]

    kept = {f"blobs/{manifest.payloads[0].sha256}" for manifest in manifests[2:]}
    assert set(files(tmp_path)) == {
        "LATEST",
        "deleted_total",
        "lock",
        "manifests/3.json",
        "manifests/7.json",
        *kept,
    }


def test_a_payload_that_retention_takes_meanwhile_is_sent_to_its_end(tmp_path: Path) -> None:
    store = DirectoryWeightStore(tmp_path, settings=WeightStoreSettings(keep_versions=1))
    payload = os.urandom(9 << 20)
    manifest = make_manifest(0, payload=payload)
    store.put_blob(manifest.payloads[0].sha256, [payload])
    store.publish(manifest)

    chunks = store.blob(manifest.payloads[0].sha256)
    first = next(chunks)
    publish(store, 1)

    assert first + b"".join(chunks) == payload


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
