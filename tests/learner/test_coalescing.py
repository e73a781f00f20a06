"""Versions that come due while an earlier one is on its way: which go out, and how many are counted."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from buffer.table import SampleRequest
from buffer.trained import TrainedGroup
from buffer.types import Sample
from learner.step import Progress
from tests.factories import RUN_ID, make_group
from tests.learner.stores import ListedStore, publisher_to
from tests.learner.test_loop import LoopRig, loop_settings


class _SlowStore(ListedStore):
    """Holds every blob back until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        assert self.gate.wait(60)
        super().put_blob(sha256, chunks)


def _coalesced(rig: LoopRig, store: _SlowStore) -> list[float]:
    """Run to the end; return how many versions had been replaced by newer ones at each update."""
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))
    with ThreadPoolExecutor(1) as executor:
        rig.publisher = publisher_to(store, run_id=RUN_ID, executor=executor)
        rig.loop().run()
    return [metrics["publish/coalesced_versions_total"] for _, metrics in rig.reporter.updates]


def test_a_version_that_a_newer_one_replaced_is_counted_once_however_long_the_upload_takes(
    model_dir: Path, tmp_path: Path
) -> None:
    rig, store = LoopRig(model_dir, tmp_path, settings=loop_settings(prefetch_batches=0)), _SlowStore()
    served, told, empty_answers = rig.draw, rig.reporter.update, iter(range(25))

    def draw(request: SampleRequest) -> list[Sample]:
        is_empty = request.learner_version == 3 and next(empty_answers, None) is not None
        return [] if is_empty else served(request)

    def update(progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        told(progress, metrics, trained)
        if progress.updates == 4:
            store.gate.set()

    rig.draw = draw  # type: ignore[method-assign]  # no data for several looks of the loop
    rig.reporter.update = update  # type: ignore[method-assign]  # the first upload lasts until the last update
    counts = _coalesced(rig, store)

    assert sorted(store.manifests) == [0, 4]
    assert counts == [0, 1, 2, 3]


def test_weights_that_go_out_in_place_of_an_older_version_that_was_due_are_counted(
    model_dir: Path, tmp_path: Path
) -> None:
    settings = loop_settings(prefetch_batches=0, publish_every=2)
    rig, store = LoopRig(model_dir, tmp_path, settings=settings), _SlowStore()
    served = rig.draw

    def draw(request: SampleRequest) -> list[Sample]:
        if request.learner_version == 3 and 3 not in store.manifests:
            store.gate.set()
            return []
        return served(request)

    rig.draw = draw  # type: ignore[method-assign]  # no data until version 3 went out
    counts = _coalesced(rig, store)

    assert sorted(store.manifests) == [0, 3, 4]
    assert counts == [0, 0, 0, 1]
