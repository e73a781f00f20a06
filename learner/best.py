"""The best evaluated version, kept as a model directory: what was measured, bit for bit, whatever training does later.

<root>/best            a link to the one below; it moves in one step
<root>/best-00000123/  version 123: config and tokenizer of the run's model and model.safetensors, for `run.model` and
                       from_pretrained; of an adapter version adapter_config.json and adapter_model.safetensors
                       instead, for peft. evaluation.json says what was measured
"""

import json
import logging
import os
import shutil
from pathlib import Path

from buffer.evaluations import Evaluation
from buffer.types import PolicyVersion
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest
from buffer.weights.store import WeightStore
from learner.disk import sync

log = logging.getLogger(__name__)

_LINK, _NEW_LINK, _PREFIX = "best", ".best-link", "best-"
_DRAFT, _FETCHED = ".best-draft", ".best-fetched"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What is taken from the run's model: configuration and tokenizer, whatever the family calls them."""
_INDEX = ".index.json"
"""How the index of weights in several files ends; the kept version is one file."""


class BestWeights:
    """Fetches versions from the weight store, which has pinned them, and keeps one. Not for several threads."""

    def __init__(self, store: WeightStore, root: Path, *, model_dir: Path) -> None:
        self._store = store
        self._root = root
        self._model_dir = model_dir

    @property
    def version(self) -> PolicyVersion | None:
        """The version that is kept; None before the first."""
        link = self._root / _LINK
        return int(link.readlink().name.removeprefix(_PREFIX)) if link.is_symlink() else None

    def keep(self, evaluation: Evaluation) -> None:
        """Keep the weights of an evaluated version in place of the one before, unless they are kept already.

        A crash at any point leaves the one before. Raises NotFound when the store does not have the version any more,
        CorruptWeights, ServiceUnreachable, StoreUnavailable.
        """
        if evaluation.version == self.version:
            return
        draft, fetched = self._root / _DRAFT, self._root / _FETCHED
        kept = self._root / f"{_PREFIX}{evaluation.version:08d}"
        for left in (draft, kept):  # by a learner that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        fetched.mkdir(exist_ok=True)  # where a download that was broken off goes on
        manifest = self._store.manifest(evaluation.version)
        mirror, _ = Follower(self._store, fetched).follow(manifest)
        assert mirror.path is not None, "a follower's mirror is a file"
        mirror.path.rename(draft / ("model.safetensors" if manifest.adapter is None else "adapter_model.safetensors"))
        self._describe(draft, manifest)
        (draft / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(kept)
        self._point_at(kept)
        shutil.rmtree(fetched)
        log.info("kept version %d, the best one, as %s", evaluation.version, self._root / _LINK)

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
        new = self._root / _NEW_LINK
        new.unlink(missing_ok=True)
        new.symlink_to(kept.name)
        os.replace(new, self._root / _LINK)
        sync(self._root)
        for old in self._root.glob(f"{_PREFIX}*"):
            if old != kept:
                shutil.rmtree(old)
