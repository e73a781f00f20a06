"""Publication by two ranks, here two threads: each sends its share, and the first one commits when all is there."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from buffer.errors import StoreUnavailable
from buffer.types import PolicyVersion
from buffer.weights.follower import Follower
from learner.distributed import Ranks
from learner.policy import Policy
from learner.snapshot import Snapshot, take_snapshot
from tests.learner.builders import make_policy
from tests.learner.stores import ListedStore, keyframe_of, publisher_to


@dataclass(frozen=True)
class _Thread(Ranks):
    """One of two ranks that meet in this process."""

    values: tuple[list[object], threading.Barrier] = ([], threading.Barrier(1))

    def from_all(self, value: object) -> list[object]:
        values, barrier = self.values
        values[self.rank] = value
        barrier.wait(30)
        seen = list(values)
        barrier.wait(30)
        return seen

    def from_first(self, value: object) -> object:
        return self.from_all(value)[0]


class _Pair:
    """Two publishers of one policy, of which each rank holds all: what travels is divided nevertheless."""

    def __init__(self, stores: tuple[ListedStore, ListedStore], stack: ExitStack) -> None:
        shared: tuple[list[object], threading.Barrier] = ([None, None], threading.Barrier(2))
        self.ranks = [_Thread(rank=rank, size=2, values=shared) for rank in (0, 1)]
        self.publishers = [
            publisher_to(store, keyframe_every=3, executor=stack.enter_context(ThreadPoolExecutor(1)), ranks=ranks)
            for store, ranks in zip(stores, self.ranks, strict=True)
        ]

    def begin(self, policy: Policy, version: PolicyVersion) -> None:
        for publisher, ranks in zip(self.publishers, self.ranks, strict=True):
            publisher.begin(_snapshot(policy, ranks), version=version)

    def flush(self) -> None:
        for publisher in self.publishers:
            publisher.flush()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def _snapshot(policy: Policy, ranks: Ranks) -> Snapshot:
    return take_snapshot(policy, dtype="bfloat16", tolerance_nats=0.05, ranks=ranks)


@torch.no_grad()
def _move(policy: Policy, names: Iterable[str]) -> None:
    for name in names:
        policy.model.get_parameter(name).view(-1)[:3] += 0.25


def test_two_ranks_send_halves_that_an_actor_puts_together(model_dir: Path, tmp_path: Path, stack: ExitStack) -> None:
    policy, store = make_policy(model_dir), ListedStore()
    pair, follower = _Pair((store, store), stack), Follower(store, tmp_path)
    names = [[spec.name for spec in _snapshot(policy, ranks).specs] for ranks in pair.ranks]
    assert sorted(names[0] + names[1]) == sorted(policy.weights())
    moved = [[], names[0] + names[1], names[0][:1], names[1][:1], []]  # nothing, all, and one rank's alone

    kinds = []
    for version, now in enumerate(moved):
        _move(policy, now)
        pair.begin(policy, version)
        pair.flush()
        manifest = store.manifest(version)
        mirror, _ = follower.follow(manifest)
        of_one = safetensors.torch.load(keyframe_of(take_snapshot(policy, dtype="bfloat16", tolerance_nats=0.05)))
        of_two = safetensors.torch.load(b"".join(mirror.keyframe()))
        assert of_two.keys() == of_one.keys()
        assert all(torch.equal(of_two[name], of_one[name]) for name in of_one)
        kinds.append([payload.kind for payload in manifest.payloads if payload.version == version])

    assert kinds == [
        ["keyframe", "keyframe"],
        ["delta", "delta"],
        ["delta"],
        ["delta", "delta", "keyframe", "keyframe"],
        ["delta"],
    ]
    sizes = [payload.size_bytes for payload in store.manifest(0).payloads]
    assert max(sizes) < 1.5 * min(sizes)
    assert pair.publishers[0].sent is not None
    assert pair.publishers[1].sent is None


def test_a_part_that_cannot_be_sent_is_everybody_s_failure_and_a_keyframe_follows(
    model_dir: Path, stack: ExitStack
) -> None:
    class Full(ListedStore):
        full = False

        def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
            if self.full:
                raise StoreUnavailable("the disk is full")
            super().put_blob(sha256, chunks)

    store, other, policy = ListedStore(), Full(), make_policy(model_dir)
    other.blobs = store.blobs
    pair = _Pair((store, other), stack)
    pair.begin(policy, 0)
    pair.flush()
    _move(policy, policy.weights())
    other.full = True
    pair.begin(policy, 1)

    with pytest.raises(StoreUnavailable, match=r"^rank 1 could not send its part of version 1: the disk is full$"):
        pair.publishers[0].flush()
    with pytest.raises(StoreUnavailable, match=r"^the disk is full$"):
        pair.publishers[1].flush()
    assert sorted(store.manifests) == [0]
    other.full = False
    pair.begin(policy, 2)
    pair.flush()

    assert [payload.kind for payload in store.manifest(2).payloads] == ["keyframe", "keyframe"]
