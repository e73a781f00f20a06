"""Checkpoints: directories that appear whole or not at all, read without unpickling anything.

<root>/update-00000050/model.safetensors       weights, float32, tied ones once
                       training.safetensors    AdamW's state `<parameter number>/<key>`, and torch's random state
                       reference.safetensors   the reference's weights, when the objective uses one
                       state.json              counters, multipliers, the model's fingerprint, the resolved settings
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from buffer.errors import RunMismatch
from learner.errors import CorruptCheckpoint
from learner.step import Progress, Trainer

_RANDOM_STATE = "torch_random_state"
_PREFIX = "update-"


class _State(BaseModel):
    """state.json"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_number: int = 1
    updates: int
    clock: int
    multipliers: dict[str, float]
    reference_id: str | None
    model_fingerprint: str
    settings: dict[str, JsonValue]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, root: Path, *, keep: int, model_fingerprint: str, resolved_settings: Mapping[str, JsonValue]
    ) -> None:
        self._root = root
        self._keep = keep
        self._model_fingerprint = model_fingerprint
        self._resolved_settings = dict(resolved_settings)

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint, None when there is none."""
        found = self._all()
        return found[-1] if found else None

    def save(self, trainer: Trainer) -> Path:
        """Write everything an update depends on; a crash at any point leaves the older checkpoints as they are."""
        final = self._root / f"{_PREFIX}{trainer.progress.updates:08d}"
        draft = self._root / f".draft-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_tensors(draft / "model.safetensors", trainer.policy.weights())
        _write_tensors(draft / "training.safetensors", _training_tensors(trainer))
        if trainer.reference is not None:
            _write_tensors(draft / "reference.safetensors", trainer.reference.policy.weights())
        (draft / "state.json").write_text(self._state(trainer).model_dump_json(indent=1))
        _sync(draft / "state.json")
        _sync(draft)
        if final.exists():  # a resumed run that got no further than its checkpoint
            shutil.rmtree(final)
        draft.rename(final)
        _sync(self._root)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def restore(self, checkpoint: Path, trainer: Trainer) -> None:
        """Make `trainer` what it was. Raises CorruptCheckpoint, RunMismatch (another model), InvalidSettings."""
        try:
            state = _State.model_validate_json((checkpoint / "state.json").read_bytes())
            weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
            training = safetensors.torch.load_file(checkpoint / "training.safetensors")
            if state.reference_id is not None:
                reference = safetensors.torch.load_file(checkpoint / "reference.safetensors")
        except (OSError, ValidationError, SafetensorError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise CorruptCheckpoint(
                f"{checkpoint} cannot be read: {reason}", hint="delete it to resume from the one before"
            ) from error
        if state.model_fingerprint != self._model_fingerprint:
            raise RunMismatch(
                f"{checkpoint} belongs to another model or tokenizer", hint="resume with the model of the checkpoint"
            )
        if (state.reference_id is None) != (trainer.reference is None):
            raise RunMismatch(
                f"{checkpoint} was written {'without' if state.reference_id is None else 'with'} a reference model",
                hint="resume with the objective of the checkpoint, or start a new run",
            )
        trainer.restore(progress=Progress(state.updates, state.clock), multipliers=state.multipliers)
        trainer.policy.load_weights(weights)
        if state.reference_id is not None and trainer.reference is not None:
            trainer.reference.restore(reference, reference_id=state.reference_id)
        _restore_training(trainer, training)

    def _all(self) -> list[Path]:
        return sorted(self._root.glob(f"{_PREFIX}*"))

    def _state(self, trainer: Trainer) -> _State:
        return _State(
            updates=trainer.progress.updates,
            clock=trainer.progress.clock,
            multipliers=trainer.multipliers,
            reference_id=None if trainer.reference is None else trainer.reference.reference_id,
            model_fingerprint=self._model_fingerprint,
            settings=self._resolved_settings,
        )


def _training_tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {_RANDOM_STATE: torch.get_rng_state()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{number}/{key}": tensor for key, tensor in state.items()}
    return tensors


def _restore_training(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors.pop(_RANDOM_STATE))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/")
        state.setdefault(int(number), {})[key] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]  # rates and decays come from the settings of today
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
