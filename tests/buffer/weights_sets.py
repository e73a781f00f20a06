"""Sets of tensors to encode: any bits that hypothesis can think of, as neighbours of one another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from buffer.weights.mirror import Mirror
from buffer.weights.tensors import WIDTHS, HostTensor, TensorSpec

SPECIAL_HALVES = (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x7C00, 0xFC00, 0x0001, 0x8001)
"""bf16 and fp16 zeros of both signs, infinities, NaN payloads, the least subnormals."""


def tensor(name: str, dtype: str, shape: Sequence[int], bits: Any) -> HostTensor:
    """Return a tensor with the given bit patterns."""
    spec = TensorSpec(name=name, dtype=dtype, shape=tuple(shape))  # type: ignore[arg-type]  # any name of WIDTHS
    return HostTensor(spec, np.asarray(bits, spec.bits_dtype).reshape(-1))


def mirror_of(tensors: Mapping[str, HostTensor], version: int = 0) -> Mirror:
    """Return a mirror that holds a copy of some tensors as `version`."""
    mirror = Mirror.allocate(tensor.spec for tensor in tensors.values())
    mirror.advance(tensors.values(), version)
    return mirror


def bits_of(tensors: Mapping[str, HostTensor]) -> dict[str, bytes]:
    """Return what tensors hold, for comparison."""
    return {name: tensor.bits.tobytes() for name, tensor in tensors.items()}


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[dict[str, HostTensor], dict[str, HostTensor]]:
    """Return two versions of a set: none, some or all values of each tensor differ, by a step or by anything."""
    old, new = {}, {}
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.sampled_from([(), (1,), (0,), (3, 0, 2), (7,), (5, 4), (300,), (33, 31)]))
        name, width = f"tensor.{number}", WIDTHS[dtype]
        size = int(np.prod(shape))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        before = np.frombuffer(rng.bytes(size * width), f"<u{width}").copy()
        special = rng.random(size) < 0.3
        chosen = rng.choice(np.array(SPECIAL_HALVES, np.uint64), int(special.sum()))
        before[special] = (chosen << np.uint64(8 * max(width - 2, 0))).astype(before.dtype)
        after = before.copy()
        changed = rng.random(size) < draw(st.sampled_from([0.0, 0.003, 0.05, 0.5, 1.0]))
        steps = rng.choice([1, -1, 2, 300, 1 << 20], size) if draw(st.booleans()) else rng.integers(0, 1 << 62, size)
        after[changed] += steps[changed].astype(after.dtype)
        old[name], new[name] = tensor(name, dtype, shape, before), tensor(name, dtype, shape, after)
    return old, new
