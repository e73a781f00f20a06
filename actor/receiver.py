"""How a published version gets into an engine: fetched while generation goes on, then put into use."""

import logging
from pathlib import Path
from typing import Protocol

from buffer.types import PolicyVersion
from buffer.weights.follower import Follower
from buffer.weights.manifest import Adapter, Manifest

log = logging.getLogger(__name__)


class Receiver(Protocol):
    """What the weight-sync thread drives: `fetch`, then `load`, each version from the first step again after an error.

    vLLM's engines are receivers: their workers fetch by themselves.
    """

    def fetch(self, manifest: Manifest) -> None:
        """Bring a version to the engine while it goes on generating.

        Raises CorruptWeights when it does not arrive as it was published, NotFound when it is not stored any more.
        """
        ...

    def load(self, manifest: Manifest) -> None:
        """Put the fetched version into use at a safe point between decode steps. Raises CorruptWeights.

        Returns once the weights are in use and caches of the old version are dropped. Tokens drawn afterwards belong
        to a new version span.
        """
        ...

    def discard(self) -> None:
        """Forget what was fetched: the next version comes from a keyframe."""
        ...


class LoadsFiles(Protocol):
    """An engine that loads files."""

    def load(self, weights: Path, version: PolicyVersion, *, adapter: Adapter | None = None) -> None:
        """Replace the weights by a safetensors file at a safe point between decode steps.

        With `adapter` the file holds its tensors alone, on top of the weights in the engine's model directory.
        The file may change afterwards.
        """
        ...


class FollowingReceiver:
    """A Receiver that keeps a mirror, from whose file an engine loads."""

    def __init__(self, follower: Follower, engine: LoadsFiles) -> None:
        self._follower = follower
        self._engine = engine
        self._file: Path | None = None

    def fetch(self, manifest: Manifest) -> None:
        """See Receiver."""
        mirror, fetched = self._follower.follow(manifest)
        self._file = mirror.path
        log.info(
            "version %d: %s, %d bytes, %.2f s",
            manifest.version,
            " + ".join(fetched.steps),
            fetched.payload_bytes,
            fetched.seconds,
        )

    def load(self, manifest: Manifest) -> None:
        """See Receiver."""
        assert self._file is not None, "a version is fetched first"
        self._engine.load(self._file, manifest.version, adapter=manifest.adapter)

    def discard(self) -> None:
        """See Receiver."""
        self._follower.discard()
