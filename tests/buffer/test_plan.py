"""The cheapest way to a version, and manifests that lead nowhere."""

from hashlib import sha256
from typing import Any

import pytest
from pydantic import ValidationError

from buffer.weights.manifest import Manifest, Payload
from buffer.weights.plan import cheapest_path
from tests.factories import make_manifest


def keyframe(version: int, size: int = 100) -> Payload:
    return Payload(kind="keyframe", version=version, sha256=sha256(b"k%d" % version).hexdigest(), size_bytes=size)


def delta(base: int, version: int, size: int = 10, part: int = 0) -> Payload:
    name = sha256(b"%d-%d-%d" % (base, version, part)).hexdigest()
    return Payload(kind="delta", version=version, base_version=base, sha256=name, size_bytes=size)


def manifest(version: int, *payloads: Payload) -> Manifest:
    return Manifest(**(dict(make_manifest(version)) | {"payloads": payloads}))


LONG = manifest(9, keyframe(4), *(delta(v, v + 1) for v in range(2, 9)))
"""A keyframe at 4; deltas from before it too."""


@pytest.mark.parametrize(
    ("case", "held", "expected"),
    [
        (LONG, 9, []),
        (LONG, 8, [(8, 9)]),
        (LONG, 2, [(v, v + 1) for v in range(2, 9)]),
        (LONG, 1, [(None, 4), *((v, v + 1) for v in range(4, 9))]),
        (LONG, None, [(None, 4), *((v, v + 1) for v in range(4, 9))]),
        (LONG, 12, [(None, 4), *((v, v + 1) for v in range(4, 9))]),
        (manifest(2, keyframe(2, 15), keyframe(0), delta(0, 1), delta(1, 2)), 0, [(None, 2)]),
        (manifest(2, keyframe(2, 25), keyframe(0), delta(0, 1), delta(1, 2)), 0, [(0, 1), (1, 2)]),
        (manifest(2, keyframe(0), delta(0, 1), delta(1, 2), delta(0, 2, 15)), 0, [(0, 2)]),
        (
            manifest(2, keyframe(0), delta(0, 1), delta(1, 2), delta(0, 2, 30, 0), delta(0, 2, 30, 1)),
            0,
            [(0, 1), (1, 2)],
        ),
    ],
)
def test_the_way_with_the_fewest_bytes_is_taken(
    case: Manifest, held: int | None, expected: list[tuple[int | None, int]]
) -> None:
    assert [(step.base_version, step.version) for step in cheapest_path(case, held)] == expected


def test_the_parts_of_a_step_stay_together() -> None:
    parts = (delta(0, 1, part=0), delta(0, 1, part=1))

    (step,) = cheapest_path(manifest(1, keyframe(0), *parts), 0)

    assert (step.parts, step.size_bytes) == (parts, 20)


@pytest.mark.parametrize(
    ("version", "payloads", "sentence"),
    [
        (1, [delta(0, 1)], "no payloads lead from a keyframe to version 1"),
        (2, [keyframe(0), delta(1, 2)], "no payloads lead from a keyframe to version 2"),
        (2, [keyframe(2), keyframe(3)], "version 2 is not reached over version 3"),
    ],
)
def test_a_manifest_that_no_way_leads_to_is_refused(version: int, payloads: list[Payload], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        manifest(version, *payloads)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "delta"}, "a delta has base_version=None"),
        ({"base_version": 1}, "a keyframe has base_version=1"),
        ({"kind": "delta", "base_version": 4}, "a delta leads from version 4 to 4"),
    ],
)
def test_a_payload_says_what_it_applies_to(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Payload(**(dict(keyframe(4)) | changes))
