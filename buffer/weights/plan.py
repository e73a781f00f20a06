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
