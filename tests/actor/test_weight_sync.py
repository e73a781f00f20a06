import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from actor.receiver import FollowingReceiver
from actor.settings import ActorSettings
from actor.torch_engine import TorchEngine
from actor.weight_sync import WeightSync
from buffer.errors import RunMismatch, ServiceUnreachable
from buffer.fingerprint import model_fingerprint
from buffer.types import PolicyVersion
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest
from tests.actor.publishing import PROBE_IDS, WrongEngine, publish, wait_until
from tests.factories import RUN_ID

MakeSync = Callable[..., WeightSync]


class FaultyStore(DirectoryWeightStore):
    """A store that loses the connection, and flips a bit of a download, as often as it is told."""

    lost_polls = 0
    flipped_blobs = 0
    fetched_blobs = 0

    def latest(self, *, after: PolicyVersion = -1, wait_s: float = 0.0) -> Manifest | None:
        if self.lost_polls:
            self.lost_polls -= 1
            raise ServiceUnreachable("no answer")
        return super().latest(after=after, wait_s=wait_s)

    def blob(self, sha256: str) -> Iterator[bytes]:
        self.fetched_blobs += 1
        content = bytearray(b"".join(super().blob(sha256)))
        if self.flipped_blobs:
            self.flipped_blobs -= 1
            content[-1] ^= 1
        yield bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> FaultyStore:
    return FaultyStore(tmp_path / "weights")


@pytest.fixture
def engine(model_dir: Path, keyframes: list[Path]) -> WrongEngine:
    engine = WrongEngine(model_dir, seed=1)
    engine.wrong_file = keyframes[2]
    return engine


@pytest.fixture
def make_sync(tmp_path: Path, model_dir: Path, store: FaultyStore, engine: WrongEngine) -> Iterator[MakeSync]:
    stop = threading.Event()
    started: list[WeightSync] = []

    def make(run_id: str = RUN_ID) -> WeightSync:
        sync = WeightSync(
            store=store,
            engine=engine,
            run_id=run_id,
            model_fingerprint=model_fingerprint(model_dir),
            receiver=FollowingReceiver(Follower(store, tmp_path), engine),
            settings=ActorSettings(poll_s=0.2, retry_s=0.05),
            stop=stop,
            jitter=random.Random(0),
        )
        sync.start()
        started.append(sync)
        return sync

    yield make
    stop.set()
    for sync in started:
        sync.join(10.0)


def test_each_published_version_is_loaded_and_proved(
    store: FaultyStore, engine: WrongEngine, make_sync: MakeSync, model_dir: Path, keyframes: list[Path], tmp_path: Path
) -> None:
    sync = make_sync()
    assert not sync.wait_ready(0.05)

    publish(store, model_dir, keyframes[0], 0)
    assert sync.wait_ready(30.0)
    publish(store, model_dir, keyframes[1], 4)
    wait_until(lambda: sync.verified_version == 4)

    expected = TorchEngine(model_dir, seed=0)
    expected.load(keyframes[1], 4)
    np.testing.assert_array_equal(engine.score(PROBE_IDS), expected.score(PROBE_IDS))
    assert (engine.version, sync.failures_total, sync.confirm(0)) == (4, 0, True)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["mirror.safetensors"]


def test_a_wrong_load_is_caught_quarantines_and_is_cured_by_fetching_again(
    store: FaultyStore, engine: WrongEngine, make_sync: MakeSync, model_dir: Path, keyframes: list[Path]
) -> None:
    publish(store, model_dir, keyframes[0], 0)
    sync = make_sync()
    assert sync.wait_ready(30.0)

    engine.wrong_loads = 10_000
    publish(store, model_dir, keyframes[1], 1)
    wait_until(lambda: sync.failures_total >= 2)

    assert not sync.wait_ready(0.05)
    assert "version 1 was loaded wrongly" in sync.quarantine_reason
    assert not sync.confirm(sync.failures_total)
    engine.wrong_loads = 0
    assert sync.wait_ready(30.0)
    assert sync.verified_version == 1
    assert store.fetched_blobs == 2 + sync.failures_total
    # what was drawn from before the failure to after the cure saw wrong weights
    assert not sync.confirm(0)
    assert sync.confirm(sync.failures_total)


def test_a_download_with_a_wrong_hash_never_reaches_the_engine(
    store: FaultyStore, engine: WrongEngine, make_sync: MakeSync, model_dir: Path, keyframes: list[Path]
) -> None:
    store.flipped_blobs = 2
    publish(store, model_dir, keyframes[0], 0)

    sync = make_sync()

    assert sync.wait_ready(30.0)
    assert store.fetched_blobs == 3
    assert sync.failures_total == 0


def test_a_lost_service_is_polled_until_it_is_back(
    store: FaultyStore, make_sync: MakeSync, model_dir: Path, keyframes: list[Path]
) -> None:
    publish(store, model_dir, keyframes[0], 0)
    store.lost_polls = 3

    assert make_sync().wait_ready(30.0)
    assert store.lost_polls == 0


def test_weights_of_another_run_end_the_actor_with_a_sentence(
    store: FaultyStore, make_sync: MakeSync, model_dir: Path, keyframes: list[Path]
) -> None:
    publish(store, model_dir, keyframes[0], 0)
    sync = make_sync("other-run")

    with pytest.raises(RunMismatch, match=r"version 0 is of run test-run .* this actor of run other-run"):
        sync.wait_ready(30.0)


def test_confirm_waits_for_the_verdict_on_a_load_that_is_under_way(
    store: FaultyStore, engine: WrongEngine, make_sync: MakeSync, model_dir: Path, keyframes: list[Path]
) -> None:
    publish(store, model_dir, keyframes[0], 0)
    sync = make_sync()
    assert sync.wait_ready(30.0)
    engine.wrong_loads = 1
    with engine._turns.take():  # the engine is in mid-step: the load cannot happen yet
        publish(store, model_dir, keyframes[1], 1)
        wait_until(sync._loading.locked)
        verdict: list[bool] = []
        asking = threading.Thread(target=lambda: verdict.append(sync.confirm(0)))
        asking.start()
        asking.join(0.1)
        assert verdict == []

    asking.join(30.0)

    assert verdict == [False]
