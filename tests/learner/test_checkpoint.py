import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buffer.errors import InvalidSettings, RunMismatch
from buffer.weights.directory_store import DirectoryWeightStore
from learner.checkpoint import Checkpoints
from learner.collate import collate
from learner.errors import CorruptCheckpoint, NonFiniteGradient
from learner.step import Progress, Trainer
from tests.learner.builders import make_trainer, plain_samples
from tests.learner.recorded_run import FINGERPRINT, train_recorded


def _checkpoints(root: Path, *, keep: int = 2, fingerprint: str = FINGERPRINT) -> Checkpoints:
    return Checkpoints(root, keep=keep, model_fingerprint=fingerprint, resolved_settings={"learner": {"lr": 1e-2}})


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Every number that the next update depends on."""
    tensors = {f"policy/{name}": tensor for name, tensor in trainer.policy.weights().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{number}/{key}": tensor for key, tensor in state.items()}
    if trainer.reference is not None:
        tensors |= {f"reference/{name}": tensor for name, tensor in trainer.reference.policy.weights().items()}
    return tensors


def test_a_process_killed_after_its_checkpoint_ends_bit_for_bit_where_an_unbroken_run_ends(
    model_dir: Path, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    straight = train_recorded(model_dir, unbroken)
    command = [sys.executable, "-m", "tests.learner.recorded_run", str(model_dir), str(broken), "13"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        process.kill()
    killed_at = DirectoryWeightStore(broken / "weights").latest_version()

    resumed = train_recorded(model_dir, broken)

    expected, seen = _state(straight), _state(resumed)
    assert seen.keys() == expected.keys()
    assert [name for name in expected if not seen[name].equal(expected[name])] == []
    assert resumed.multipliers == straight.multipliers != {}
    # the weights of update 10 are published again as version 14: none of the versions 0 to 13 comes twice
    assert killed_at == 13
    assert straight.progress == Progress(updates=20, clock=20)
    assert resumed.progress == Progress(updates=20, clock=14 + 10)


def test_only_the_newest_checkpoints_are_kept_and_drafts_are_not_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    for left in (".draft", ".discarded"):  # by processes that were killed while they wrote, or deleted
        (tmp_path / left / "shard").mkdir(parents=True)
    for updates in (1, 2, 10):
        trainer.progress = Progress(updates, updates)
        checkpoints.save(trainer)

    assert [path.name for path in sorted(tmp_path.glob("update-*"))] == ["update-00000002", "update-00000010"]
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.newest() == tmp_path / "update-00000010"


def test_saving_the_same_update_again_replaces_it(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    checkpoints.save(trainer)
    trainer.progress = Progress(updates=0, clock=4)

    saved = checkpoints.save(trainer)

    resumed = make_trainer(model_dir)
    checkpoints.restore(saved, resumed)
    assert resumed.progress == Progress(updates=0, clock=4)


def test_a_run_that_is_saved_before_its_first_step_goes_on_as_one_that_was_not(model_dir: Path, tmp_path: Path) -> None:
    batch = collate(plain_samples(0), clock=0)
    unbroken, broken, resumed = (make_trainer(model_dir) for _ in range(3))
    handle = broken.policy.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteGradient):
        broken.update(batch)
    handle.remove()

    _checkpoints(tmp_path).restore(_checkpoints(tmp_path).save(broken), resumed)

    unbroken.update(batch)
    for trainer in (broken, resumed):
        trainer.update(batch)
        assert [name for name, tensor in _state(unbroken).items() if not _state(trainer)[name].equal(tensor)] == []


@pytest.mark.parametrize("name", ["state.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_damaged_checkpoint_is_named(model_dir: Path, tmp_path: Path, name: str) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    saved = checkpoints.save(trainer)
    (saved / name).write_bytes((saved / name).read_bytes()[:20])

    with pytest.raises(CorruptCheckpoint, match=r"update-00000000 cannot be read.*delete it"):
        checkpoints.restore(saved, trainer)


def test_a_checkpoint_of_another_schema_is_refused(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    state = checkpoints.save(trainer) / "state.json"
    state.write_text(state.read_text().replace('"schema_number": 2', '"schema_number": 1'))

    with pytest.raises(InvalidSettings, match=r"written by another build: its schema number is 1, this build reads 2"):
        checkpoints.restore(state.parent, trainer)


def test_a_checkpoint_of_another_model_or_objective_is_refused(model_dir: Path, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    saved = checkpoints.save(make_trainer(model_dir, objective="grpo"))

    with pytest.raises(RunMismatch, match="belongs to another model"):
        _checkpoints(tmp_path, fingerprint="b" * 64).restore(saved, make_trainer(model_dir))
    with pytest.raises(RunMismatch, match="without a reference"):
        checkpoints.restore(saved, make_trainer(model_dir, objective="reval"))
    with pytest.raises(InvalidSettings, match="has the multipliers"):
        checkpoints.restore(saved, make_trainer(model_dir, objective="r2vpo"))


def test_a_resumed_random_state_goes_on_where_it_was(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    torch.manual_seed(5)
    saved = checkpoints.save(trainer)
    expected = torch.rand(3)

    torch.manual_seed(6)
    checkpoints.restore(saved, trainer)

    assert torch.rand(3).equal(expected)
