"""What an error leaves of a run: a checkpoint wherever the weights are good, nothing after half an update."""

from pathlib import Path

import pytest

from buffer.errors import Conflict, Forbidden, InvalidRequest, ServiceUnreachable, StalewiseError
from buffer.table import SampleRequest
from buffer.types import Sample
from buffer.weights.manifest import Manifest
from learner.loop import take_up
from learner.step import Progress
from tests.factories import make_group
from tests.learner.test_loop import LoopRig, loop_settings


def rig_that_loses_its_service(model_dir: Path, tmp_path: Path, error: StalewiseError) -> LoopRig:
    """A learner whose third draw raises `error`."""
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=1_000, prefetch_batches=0))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))

    def sample(request: SampleRequest) -> list[Sample]:
        if request.learner_version < 2:
            return rig.table.sample(request)
        raise error

    rig.draw = sample  # type: ignore[method-assign]
    return rig


def test_a_stop_while_the_service_is_away_saves_and_ends(model_dir: Path, tmp_path: Path) -> None:
    rig = rig_that_loses_its_service(model_dir, tmp_path, ServiceUnreachable("no answer"))
    draw = rig.draw

    def told_to_stop(request: SampleRequest) -> list[Sample]:
        if request.learner_version == 2:
            rig.stop.set()
        return draw(request)

    rig.draw = told_to_stop  # type: ignore[method-assign]
    rig.loop().run()

    assert rig.checkpoints.newest() == tmp_path / "update-00000002"


def test_a_finished_run_that_is_started_again_takes_no_groups(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=2, prefetch_batches=1))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))
    rig.loop().run()
    drawn = rig.table.stats().sampled_total

    take_up(rig.trainer, rig.checkpoints, rig.publisher, resume=True)
    rig.loop().run()

    assert rig.trainer.progress.updates == 2
    assert rig.table.stats().sampled_total == drawn


@pytest.mark.parametrize(
    "error",
    [
        ServiceUnreachable("no answer"),
        InvalidRequest("no group can ever fit"),
        Forbidden("the role was changed"),
        StalewiseError("a defect"),
    ],
    ids=lambda error: error.code(),
)
def test_a_draw_that_fails_or_is_refused_costs_no_work(model_dir: Path, tmp_path: Path, error: StalewiseError) -> None:
    rig = rig_that_loses_its_service(model_dir, tmp_path, error)

    with pytest.raises(type(error)):
        rig.loop().run()

    assert rig.checkpoints.newest() == tmp_path / "update-00000002"


def test_a_version_that_is_refused_costs_no_work(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings(total_updates=1_000))
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))
    published = rig.store.publish

    def publish(manifest: Manifest) -> None:
        if manifest.version == 2:
            raise Conflict("somebody else has published it")
        published(manifest)

    rig.store.publish = publish  # type: ignore[method-assign]  # another learner of the same run
    with pytest.raises(Conflict):
        rig.loop().run()

    assert rig.trainer.progress == Progress(3, 3)  # what became of version 2 is heard before 3 is begun
    assert rig.checkpoints.newest() == tmp_path / "update-00000003"


def test_after_an_update_that_failed_half_way_nothing_is_saved_or_published(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())
    rig.table.advance_version(0)
    rig.insert(make_group("a"), make_group("b"))
    step = rig.trainer.optimizer.step

    def fail(*_: object) -> None:
        if rig.trainer.progress.updates == 2:
            raise RuntimeError("out of memory")
        step()

    rig.trainer.optimizer.step = fail  # type: ignore[method-assign,assignment]  # a GPU that is full
    with pytest.raises(RuntimeError, match="out of memory"):
        rig.loop().run()

    assert sorted(rig.store.manifests) == [0, 1, 2]
    assert rig.checkpoints.newest() is None


@pytest.mark.timeout(30)
def test_a_defect_in_a_draw_ends_the_run_instead_of_leaving_it_to_wait(model_dir: Path, tmp_path: Path) -> None:
    rig = LoopRig(model_dir, tmp_path, settings=loop_settings())

    def defect(request: SampleRequest) -> list[Sample]:
        raise RuntimeError("a defect")

    rig.draw = defect  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a defect"):
        rig.loop().run()
