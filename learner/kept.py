"""A published version, kept as a model directory: the best one that was evaluated, or the last one of a run.

<root>/best            a link to the one below; it moves in one step
<root>/best-00000123/  version 123, bit for bit: config and tokenizer of the run's model and model.safetensors, for
                       `run.model` and from_pretrained; of an adapter version adapter_config.json and
                       adapter_model.safetensors instead, for peft. evaluation.json says what was measured, if it was
"""

import json
import logging
import os
import shutil
from pathlib import Path

from buffer.disk import sync
from buffer.evaluations import Evaluation
from buffer.types import PolicyVersion
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest
from buffer.weights.store import WeightStore

log = logging.getLogger(__name__)

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What is taken from the run's model: configuration and tokenizer, whatever the family calls them."""
_INDEX = ".index.json"
"""How the index of weights in several files ends; the kept version is one file."""


class KeptVersion:
    """Fetches versions from the weight store, and keeps one, as root/name. Not for several threads."""

    def __init__(self, store: WeightStore, root: Path, name: str, *, model_dir: Path) -> None:
        self._store = store
        self._root = root
        self._name = name
        self._link = root / name
        self._model_dir = model_dir

    @property
    def version(self) -> PolicyVersion | None:
        """The version that is kept; None before the first."""
        return int(self._link.readlink().name.rpartition("-")[2]) if self._link.is_symlink() else None

    def keep(self, version: PolicyVersion, evaluation: Evaluation | None = None) -> None:
        """Keep the weights of a version in place of the one before, unless they are kept already.

        A crash at any point leaves the one before. Raises NotFound when the store does not have the version any more,
        CorruptWeights, ServiceUnreachable, StoreUnavailable.
        """
        if version == self.version:
            return
        draft, fetched = self._root / f".{self._name}-draft", self._root / f".{self._name}-fetched"
        kept = self._root / f"{self._name}-{version:08d}"
        for left in (draft, kept):  # by a learner that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        fetched.mkdir(exist_ok=True)  # where a download that was broken off goes on
        manifest = self._store.manifest(version)
        mirror, _ = Follower(self._store, fetched).follow(manifest)
        assert mirror.path is not None, "a follower's mirror is a file"
        mirror.path.rename(draft / ("model.safetensors" if manifest.adapter is None else "adapter_model.safetensors"))
        self._describe(draft, manifest)
        if evaluation is not None:
            (draft / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(kept)
        self._point_at(kept)
        shutil.rmtree(fetched)
        log.info("kept version %d as %s", version, self._link)

    def _describe(self, directory: Path, manifest: Manifest) -> None:
        """Put beside the weights what a reader needs to load them."""
        if manifest.adapter is not None:
            config = {**manifest.adapter.peft_config(), "base_model_name_or_path": str(self._model_dir)}
            (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
            return
        for path in {path for pattern in _COPIED for path in self._model_dir.glob(pattern)}:
            if not path.name.endswith(_INDEX):
                shutil.copyfile(path, directory / path.name)

    def _point_at(self, kept: Path) -> None:
        new = self._root / f".{self._name}-link"
        new.unlink(missing_ok=True)
        new.symlink_to(kept.name)
        os.replace(new, self._link)
        sync(self._root)
        for old in self._root.glob(f"{self._name}-*"):
            if old != kept:
                shutil.rmtree(old)
