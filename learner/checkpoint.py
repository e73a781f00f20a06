"""Checkpoints: directories that appear whole or not at all, read without unpickling anything.

<root>/update-00000050/shard-*.safetensors   one file a rank, written by torch.distributed.checkpoint: any number of
                                             ranks reads them back, each its own part
                       state.json            counters, multipliers, trackers, the model's fingerprint, the settings

Names of tensors: `policy/<weight>`, `optimizer/state.<parameter>.<key>`, `reference/<weight>` when the objective uses
a reference of its own, and `torch_random_state`. With several ranks the root is on a file system that all share.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from buffer.disk import sync
from buffer.errors import InvalidSettings, RunMismatch
from learner.distributed import ALONE, Ranks
from learner.errors import CorruptCheckpoint
from learner.step import Progress, Trainer

_RANDOM_STATE = "torch_random_state"
_OPTIMIZER, _OPTIMIZER_STATE = "optimizer/", "state."
_PREFIX, _DRAFT, _DISCARDED = "update-", ".draft", ".discarded"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class _State(BaseModel):
    """state.json"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_number: Literal[2] = 2
    updates: int
    clock: int
    multipliers: dict[str, float]
    trackers: dict[str, JsonValue]
    reference_id: str | None
    model_fingerprint: str
    settings: dict[str, JsonValue]


class Checkpoints:
    """The checkpoints of one run. With several ranks all of them make each call."""

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        model_fingerprint: str,
        resolved_settings: Mapping[str, JsonValue],
        ranks: Ranks = ALONE,
    ) -> None:
        self._root = root
        self._keep = keep
        self._model_fingerprint = model_fingerprint
        self._resolved_settings = dict(resolved_settings)
        self._ranks = ranks

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint, None when there is none."""
        found = self._all()
        return found[-1] if found else None

    def save(self, trainer: Trainer) -> Path:
        """Write everything an update depends on; a crash at any point leaves the older checkpoints as they are."""
        final = self._root / f"{_PREFIX}{trainer.progress.updates:08d}"
        draft = self._root / _DRAFT
        if self._ranks.is_first:
            for left in (draft, self._root / _DISCARDED):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir(parents=True)
        self._ranks.wait_for_all()
        writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
        with _no_complaint_of_one_process():
            save(_tensors(trainer), storage_writer=writer, no_dist=self._ranks.size == 1)
        if self._ranks.is_first:
            (draft / "state.json").write_text(self._state(trainer).model_dump_json(indent=1))
            sync(draft / "state.json")
            sync(draft)
            if final.exists():  # a resumed run that got no further than its checkpoint
                self._discard(final)
            draft.rename(final)
            sync(self._root)
            for old in self._all()[: -self._keep]:
                self._discard(old)
        self._ranks.wait_for_all()
        return final

    def restore(self, checkpoint: Path, trainer: Trainer) -> None:
        """Make `trainer` what it was. Raises CorruptCheckpoint, RunMismatch (another model), InvalidSettings."""
        try:
            state = _State.model_validate_json((checkpoint / "state.json").read_bytes())
        except OSError as error:
            raise _unreadable(checkpoint, error) from error
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["loc"] == ("schema_number",):
                raise InvalidSettings(
                    f"{checkpoint} was written by another build: its schema number is {problem['input']!r}, this build "
                    f"reads {_State.model_fields['schema_number'].default}",
                    hint="resume with that build, or begin a run from the directory learner/final or learner/best",
                ) from error
            raise _unreadable(checkpoint, problem["msg"]) from error
        if state.model_fingerprint != self._model_fingerprint:
            raise RunMismatch(
                f"{checkpoint} belongs to another model or tokenizer", hint="resume with the model of the checkpoint"
            )
        if (state.reference_id is None) != (trainer.reference is None):
            raise RunMismatch(
                f"{checkpoint} was written {'without' if state.reference_id is None else 'with'} a reference model",
                hint="resume with the objective of the checkpoint, or start a new run",
            )
        trainer.restore(
            progress=Progress(state.updates, state.clock), multipliers=state.multipliers, trackers=state.trackers
        )
        tensors = self._read(checkpoint, trainer)
        torch.set_rng_state(tensors[_RANDOM_STATE])
        _restore_optimizer(trainer, tensors)
        if state.reference_id is not None and trainer.reference is not None:
            trainer.reference.restore(trainer.reference.policy.weights(), reference_id=state.reference_id)

    def _read(self, checkpoint: Path, trainer: Trainer) -> dict[str, Tensor]:
        """Read every tensor of the trainer in place, and return them by name."""
        tensors = _tensors(trainer)
        reader = HuggingFaceStorageReader(str(checkpoint))
        try:
            stored = reader.read_metadata().state_dict_metadata
            if odd := sorted(stored.keys() ^ tensors.keys()):
                raise CorruptCheckpoint(
                    f"{checkpoint} is not of this model: {len(odd)} tensors differ by name, first {odd[0]}",
                    hint="resume with the settings of the checkpoint, which its state.json holds",
                )
            with _no_complaint_of_one_process():
                load(tensors, storage_reader=reader, no_dist=self._ranks.size == 1)
        except (OSError, SafetensorError, ValueError, CheckpointException) as error:
            raise _unreadable(checkpoint, error) from error
        return tensors

    def _all(self) -> list[Path]:
        return sorted(self._root.glob(f"{_PREFIX}*"))

    def _discard(self, checkpoint: Path) -> None:
        """Delete a checkpoint so that half of one is never taken for a whole one."""
        discarded = self._root / _DISCARDED
        checkpoint.rename(discarded)
        shutil.rmtree(discarded)

    def _state(self, trainer: Trainer) -> _State:
        return _State(
            updates=trainer.progress.updates,
            clock=trainer.progress.clock,
            multipliers=trainer.multipliers,
            trackers=trainer.trackers(),
            reference_id=None if trainer.reference is None else trainer.reference.reference_id,
            model_fingerprint=self._model_fingerprint,
            settings=self._resolved_settings,
        )


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by name: views, but for the random state."""
    tensors = {f"policy/{name}": tensor for name, tensor in trainer.policy.weights().items()}
    tensors |= {_OPTIMIZER + name: tensor for name, tensor in _optimizer_state(trainer).items()}
    if trainer.reference is not None:
        tensors |= {f"reference/{name}": tensor for name, tensor in trainer.reference.policy.weights().items()}
    return {**tensors, _RANDOM_STATE: torch.get_rng_state()}


def _optimizer_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return the moments and step counts by parameter, of zeros before the first step; no rates: settings have them."""
    trainer.optimizer.zero_grad()  # where there are gradients, as of a skipped update, torch makes no state to look at
    is_new = not trainer.optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(trainer.policy.model, trainer.optimizer, options=_FLAT)
    if is_new:  # torch made it by a step along gradients of 0, and counted that one
        for of_parameter in trainer.optimizer.state.values():
            of_parameter["step"].zero_()
    return {name: value for name, value in state.items() if name.startswith(_OPTIMIZER_STATE)}


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    state: dict[str, Any] = get_optimizer_state_dict(trainer.policy.model, trainer.optimizer, options=_FLAT)
    state |= {name: tensors[_OPTIMIZER + name] for name in state if name.startswith(_OPTIMIZER_STATE)}
    set_optimizer_state_dict(trainer.policy.model, trainer.optimizer, state, options=_FLAT)


@contextmanager
def _no_complaint_of_one_process() -> Iterator[None]:
    """Silence the warning that there is no process group, which one process does not need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _unreadable(checkpoint: Path, reason: object) -> CorruptCheckpoint:
    first_line = str(reason).strip().partition("\n")[0]
    return CorruptCheckpoint(
        f"{checkpoint} cannot be read: {first_line}", hint="delete it to resume from the one before"
    )
