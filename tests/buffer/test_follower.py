"""An actor's mirror on its way from version to version, with deltas and keyframes that go wrong."""

from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from buffer.errors import CorruptWeights, NotFound, ServiceUnreachable
from buffer.types import PolicyVersion
from buffer.weights.delta import write_delta
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest, Payload
from buffer.weights.mirror import Mirror
from buffer.weights.plan import Step, Ways
from buffer.weights.progress import progress_path
from buffer.weights.store import WeightStore, WeightStoreSettings, write_chunks
from buffer.weights.tensors import HostTensor, checksum
from tests.buffer.weights_sets import bits_of, mirror_of, tensor
from tests.factories import make_manifest


class Learner:
    """Publishes versions of two small tensors, in one part or in two."""

    def __init__(self, store: WeightStore, *, num_parts: int = 1, keyframe_every: int = 100) -> None:
        self.store = store
        rng = np.random.default_rng(0)
        self.tensors = {name: tensor(name, "BF16", [500], rng.integers(0, 1 << 16, 500, np.uint16)) for name in "ab"}
        names = ["ab"] if num_parts == 1 else ["a", "b"]
        self.parts = [mirror_of({name: self.tensors[name] for name in part}) for part in names]
        self.ways = Ways(keyframe_every=keyframe_every)
        self.version: PolicyVersion = -1

    def publish(self) -> Manifest:
        base, self.version = self.version, self.version + 1
        steps, deltas = [], []
        for part in self.parts:
            values = [tensor(n, "BF16", [500], self.moved(t)) for n, t in part.tensors.items()]
            deltas.append(b"".join(write_delta(max(base, 0), max(base, 0) + 1, part.advance(values, self.version))))
        if base >= 0:
            steps.append(Step(base, self.version, tuple(self.put("delta", base, [delta]) for delta in deltas)))
        if self.ways.keyframe_is_due(sum(map(len, deltas))):
            frames = [self.put("keyframe", None, part.keyframe()) for part in self.parts]
            steps.append(Step(None, self.version, tuple(frames)))
        everything = {n: t for part in self.parts for n, t in part.tensors.items()}
        manifest = Manifest(
            **(
                dict(make_manifest(self.version))
                | {
                    "payloads": self.ways.add(steps),
                    "checksum": checksum((tensor.spec, tensor.digest()) for tensor in everything.values()),
                }
            )
        )
        self.store.publish(manifest)
        self.tensors = everything
        return manifest

    def moved(self, old: HostTensor) -> np.ndarray:
        bits = old.bits.copy()
        bits[self.version :: 97] += 1
        return bits

    def put(self, kind: str, base: PolicyVersion | None, chunks: Iterable[bytes | memoryview]) -> Payload:
        content = b"".join(chunks)
        name = sha256(content).hexdigest()
        self.store.put_blob(name, [content])
        return Payload.model_validate(
            {
                "kind": kind,
                "version": self.version,
                "base_version": base,
                "sha256": name,
                "size_bytes": len(content),
            }
        )


class SpoiltStore(DirectoryWeightStore):
    """Spoils downloads by a function, and remembers what was asked for."""

    spoil: Callable[[Payload, bytes], bytes] = staticmethod(lambda payload, content: content)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, settings=WeightStoreSettings(keep_versions=2))
        self.asked: list[str] = []

    def download(self, payload: Payload, path: Path) -> None:
        self.asked.append(payload.kind)
        write_chunks([self.spoil(payload, b"".join(self.blob(payload.sha256)))], path)


@pytest.fixture
def store(tmp_path: Path) -> SpoiltStore:
    return SpoiltStore(tmp_path / "weights")


def follower_of(store: SpoiltStore, tmp_path: Path) -> Follower:
    directory = tmp_path / "actor"
    directory.mkdir()
    return Follower(store, directory)


def flip_in_the_middle(content: bytes) -> bytes:
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 4
    return bytes(flipped)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_follower_holds_exactly_what_was_published_whatever_it_missed(
    store: SpoiltStore, tmp_path: Path, num_parts: int
) -> None:
    learner, follower = Learner(store, num_parts=num_parts, keyframe_every=5), follower_of(store, tmp_path)
    for version in range(12):
        manifest = learner.publish()
        if version in (3, 4, 8, 9):
            continue

        mirror, fetched = follower.follow(manifest)

        assert bits_of(mirror.tensors) == bits_of(learner.tensors)
        assert mirror.path is not None
        assert bits_of(Mirror.open(mirror.path, version).tensors) == bits_of(learner.tensors)
        missed = 3 if version in (5, 10) else 1
        assert fetched.steps == (("delta",) * missed if version else ("keyframe",))
    assert [path.name for path in (tmp_path / "actor").iterdir()] == ["mirror.safetensors"]


@pytest.mark.parametrize(
    "spoil", [flip_in_the_middle, lambda content: content[:-1], lambda content: b"", lambda c: c + c]
)
def test_a_spoilt_delta_is_answered_by_a_keyframe(
    store: SpoiltStore, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    learner, follower = Learner(store), follower_of(store, tmp_path)
    follower.follow(learner.publish())
    manifest = learner.publish()
    deltas = iter([spoil])
    store.spoil = lambda p, content: next(deltas, lambda c: c)(content) if p.kind == "delta" else content

    mirror, fetched = follower.follow(manifest)

    assert bits_of(mirror.tensors) == bits_of(learner.tensors)
    assert store.asked == ["keyframe", "delta", "keyframe", "delta"]
    assert fetched.steps == ("keyframe", "delta")


def test_weights_that_were_changed_in_place_are_noticed_and_fetched_anew(store: SpoiltStore, tmp_path: Path) -> None:
    learner, follower = Learner(store), follower_of(store, tmp_path)
    mirror, _ = follower.follow(learner.publish())
    mirror.tensors["a"].bits[3] ^= 1

    mirror, fetched = follower.follow(learner.publish())

    assert bits_of(mirror.tensors) == bits_of(learner.tensors)
    assert fetched.steps == ("keyframe", "delta")


def test_a_spoilt_keyframe_is_never_handed_out(store: SpoiltStore, tmp_path: Path) -> None:
    learner, follower = Learner(store), follower_of(store, tmp_path)
    manifest = learner.publish()
    store.spoil = lambda payload, content: content[:-1] + b"?"

    with pytest.raises(CorruptWeights, match="leads to other weights than its manifest names"):
        follower.follow(manifest)

    store.spoil = lambda payload, content: content
    mirror, _ = follower.follow(manifest)
    assert bits_of(mirror.tensors) == bits_of(learner.tensors)


def test_a_way_that_retention_cut_off_goes_on_with_the_next_manifest(store: SpoiltStore, tmp_path: Path) -> None:
    learner, follower = Learner(store, keyframe_every=2), follower_of(store, tmp_path)
    old = learner.publish()
    for _ in range(6):
        newest = learner.publish()

    with pytest.raises(NotFound):
        follower.follow(old)

    mirror, _ = follower.follow(newest)
    assert mirror.version == 6


def test_what_no_step_wants_is_deleted_and_a_broken_download_is_not(store: SpoiltStore, tmp_path: Path) -> None:
    learner, follower = Learner(store), follower_of(store, tmp_path)
    manifest = learner.publish()
    wanted = tmp_path / "actor" / f"part-{manifest.payloads[0].sha256}.safetensors"
    rubbish = tmp_path / "actor" / f"part-{'0' * 64}.safetensors"
    for part in (wanted, progress_path(wanted), rubbish, progress_path(rubbish)):
        part.write_bytes(b"left")

    def unreachable(payload: Payload, content: bytes) -> bytes:
        raise ServiceUnreachable("no answer")

    store.spoil = unreachable
    with pytest.raises(ServiceUnreachable):
        follower.follow(manifest)
    left = set((tmp_path / "actor").iterdir())

    store.spoil = lambda payload, content: content
    mirror, _ = follower.follow(manifest)

    assert left == {wanted, progress_path(wanted)}
    assert bits_of(mirror.tensors) == bits_of(learner.tensors)
