from pathlib import Path

import pytest
import torch
from torch import Tensor

from buffer.errors import InvalidSettings, RunMismatch
from buffer.types import Sample
from learner.checkpoint import Checkpoints
from learner.collate import collate
from learner.errors import CorruptCheckpoint
from learner.step import Progress, Trainer
from tests.learner.builders import make_trainer, plain_samples

FINGERPRINT = "a" * 64


def _checkpoints(root: Path, *, keep: int = 2, fingerprint: str = FINGERPRINT) -> Checkpoints:
    return Checkpoints(root, keep=keep, model_fingerprint=fingerprint, resolved_settings={"learner": {"lr": 1e-2}})


def _train(trainer: Trainer, batches: list[list[Sample]]) -> None:
    for samples in batches:
        trainer.update(collate(samples, clock=trainer.progress.clock))


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Every number that the next update depends on."""
    tensors = {f"policy/{name}": tensor for name, tensor in trainer.policy.weights().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{number}/{key}": tensor for key, tensor in state.items()}
    if trainer.reference is not None:
        tensors |= {f"reference/{name}": tensor for name, tensor in trainer.reference.policy.weights().items()}
    return tensors


@pytest.mark.parametrize(("objective", "reset_every"), [("grpo", None), ("r2vpo", None), ("stalewise", 6)])
def test_twenty_updates_equal_ten_a_restart_and_ten_bit_for_bit(
    model_dir: Path, tmp_path: Path, objective: str, reset_every: int | None
) -> None:
    recorded = [plain_samples(seed) for seed in range(20)]
    straight = make_trainer(model_dir, objective=objective, reference_reset_every=reset_every)
    _train(straight, recorded)
    first_half = make_trainer(model_dir, objective=objective, reference_reset_every=reset_every)
    _train(first_half, recorded[:10])
    _checkpoints(tmp_path).save(first_half)

    resumed = make_trainer(model_dir, objective=objective, reference_reset_every=reset_every)
    newest = _checkpoints(tmp_path).newest()
    assert newest is not None
    _checkpoints(tmp_path).restore(newest, resumed)
    _train(resumed, recorded[10:])

    assert resumed.progress == straight.progress == Progress(20, 20)
    assert resumed.multipliers == straight.multipliers
    expected, seen = _state(straight), _state(resumed)
    assert seen.keys() == expected.keys()
    assert [name for name in expected if not seen[name].equal(expected[name])] == []
    assert not expected["policy/model.norm.weight"].equal(_state(first_half)["policy/model.norm.weight"])


def test_only_the_newest_checkpoints_are_kept_and_drafts_are_not_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    (tmp_path / ".draft-1").mkdir()  # a process that was killed while it wrote
    for updates in (1, 2, 10):
        trainer.progress = Progress(updates, updates)
        checkpoints.save(trainer)

    assert [path.name for path in sorted(tmp_path.glob("update-*"))] == ["update-00000002", "update-00000010"]
    assert checkpoints.newest() == tmp_path / "update-00000010"


def test_saving_the_same_update_again_replaces_it(model_dir: Path, tmp_path: Path) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    checkpoints.save(trainer)
    trainer.progress = Progress(updates=0, clock=4)

    saved = checkpoints.save(trainer)

    resumed = make_trainer(model_dir)
    checkpoints.restore(saved, resumed)
    assert resumed.progress == Progress(updates=0, clock=4)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "training.safetensors"])
def test_a_damaged_checkpoint_is_named(model_dir: Path, tmp_path: Path, name: str) -> None:
    trainer, checkpoints = make_trainer(model_dir), _checkpoints(tmp_path)
    saved = checkpoints.save(trainer)
    (saved / name).write_bytes((saved / name).read_bytes()[:20])

    with pytest.raises(CorruptCheckpoint, match=r"update-00000000 cannot be read.*delete it"):
        checkpoints.restore(saved, trainer)


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
