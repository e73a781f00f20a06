"""The cheapest way to a version: a chain of deltas from what is held, or a keyframe and what follows it."""

from collections.abc import Iterable
from dataclasses import dataclass

from buffer.types import PolicyVersion
from buffer.weights.manifest import Manifest, Payload


@dataclass(frozen=True, slots=True)
class Step:
    """One keyframe or one delta, with the files that it consists of."""

    base_version: PolicyVersion | None  # None: a keyframe
    version: PolicyVersion
    parts: tuple[Payload, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes to download."""
        return sum(part.size_bytes for part in self.parts)


def cheapest_path(manifest: Manifest, held: PolicyVersion | None) -> tuple[Step, ...]:
    """Return the steps with the fewest bytes from the held version to the manifest's; () when it is held."""
    paths: dict[PolicyVersion | None, tuple[int, tuple[Step, ...]]] = {None: (0, ())}
    if held is not None:
        paths[held] = (0, ())
    for step in _steps(manifest.payloads):
        if step.base_version in paths:
            size, path = paths[step.base_version]
            size += step.size_bytes
            if step.version not in paths or size < paths[step.version][0]:
                paths[step.version] = (size, (*path, step))
    return paths[manifest.version][1]


def _steps(payloads: Iterable[Payload]) -> list[Step]:
    """Return the steps, those to earlier versions first."""
    parts: dict[tuple[PolicyVersion, PolicyVersion | None], list[Payload]] = {}
    for payload in payloads:
        parts.setdefault((payload.version, payload.base_version), []).append(payload)
    ordered = sorted(parts.items(), key=lambda item: item[0][0])
    return [Step(base, version, tuple(files)) for (version, base), files in ordered]


class Ways:
    """What a publisher lists in its manifests: the newest keyframe, the deltas since, and older ones that are worth it.

    A newcomer never downloads more than two models: a keyframe is due when the deltas since the last one add up to it.
    """

    def __init__(self, *, keyframe_every: int) -> None:
        self._keyframe_every = keyframe_every
        self._steps: list[Step] = []

    def keyframe_is_due(self, delta_bytes: int) -> bool:
        """Whether the next version, which a delta of so many bytes leads to, needs a keyframe of its own."""
        keyframe, since = self._since_keyframe()
        if keyframe is None:
            return True
        sizes = [step.size_bytes for step in since]
        return len(sizes) + 1 >= self._keyframe_every or sum(sizes) + delta_bytes > keyframe.size_bytes

    def add(self, steps: Iterable[Step]) -> tuple[Payload, ...]:
        """Take the steps to a new version, and return all that its manifest lists."""
        self._steps.extend(steps)
        keyframe, since = self._since_keyframe()
        assert keyframe is not None, "a first version has a keyframe"
        room = keyframe.size_bytes
        kept: list[Step] = []
        for step in reversed([step for step in self._steps if step.base_version is not None and step not in since]):
            room -= step.size_bytes
            if room < 0:
                break
            kept.insert(0, step)
        self._steps = [*kept, keyframe, *since]
        return tuple(part for step in self._steps for part in step.parts)

    def _since_keyframe(self) -> tuple[Step | None, list[Step]]:
        keyframe = next((step for step in reversed(self._steps) if step.base_version is None), None)
        newest = -1 if keyframe is None else keyframe.version
        since = [s for s in self._steps if s.base_version is not None and s.base_version >= newest]
        return keyframe, since
