"""Deltas between two sets of tensors that lie in memory; a publisher, which holds one set, has Mirror.advance."""

from collections.abc import Iterator, Mapping

from buffer.types import PolicyVersion
from buffer.weights.changes import Change, find_change
from buffer.weights.delta import ChangedTensor, TensorChange, blocks_of, write_delta
from buffer.weights.tensors import HostTensor


def delta_between(
    base: Mapping[str, HostTensor],
    result: Mapping[str, HostTensor],
    *,
    base_version: PolicyVersion,
    version: PolicyVersion,
) -> Iterator[bytes]:
    """Yield the delta between two sets of the same tensors."""
    changed = []
    for name, new in result.items():
        before, after = base[name].digest(), new.digest()
        if before != after:
            entry = ChangedTensor(**dict(new.spec), base=before, result=after)
            changed.append(TensorChange(entry, _changes(base[name], new)))
    return write_delta(base_version, version, changed)


def _changes(base: HostTensor, result: HostTensor) -> Iterator[Change | None]:
    for start, stop in blocks_of(result.spec.num_values):
        yield find_change(base.read(start, stop), result.read(start, stop))
