"""Which sequences share a micro-batch, and how they stand in it: end to end, without padding.

Legend: S tokens of a micro-batch; b sequences in it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.collate import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences end to end. Attention must not cross `bounds`."""

    token_ids: Tensor  # [1, S] int64
    position_ids: Tensor  # [1, S] int64, from 0 in each sequence
    bounds: Tensor  # [b + 1] int32: where each sequence begins, and S
    longest: int  # tokens of the longest sequence


def pack(lengths: Sequence[int], capacity: int, *, num_ranks: int = 1) -> list[list[int]]:
    """Return bins of indices whose lengths sum to at most `capacity`; a longer sequence has a bin of its own.

    One rank: first-fit-decreasing. Several: a multiple of `num_ranks` bins with sums as equal as they come, of which
    rank r takes bins r, r + num_ranks, ...; bins may be empty when there are fewer sequences than ranks.
    """
    bins = _first_fit_decreasing(lengths, capacity)
    if num_ranks == 1:
        return bins
    count = -(-len(bins) // num_ranks) * num_ranks
    while (balanced := _least_loaded(lengths, capacity, count)) is None:
        count += num_ranks
    return balanced


def join(batch: Batch, rows: Tensor) -> Packed:
    """Lay `rows` [b] of the batch end to end, on the batch's device."""
    lengths = batch.sequence_lengths[rows]
    longest = int(lengths.max())
    position = torch.arange(longest)
    real = position < lengths[:, None]  # [b, longest]
    bounds = torch.zeros(len(rows) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return Packed(
        token_ids=batch.token_ids[rows, :longest][real][None],
        position_ids=position.expand_as(real)[real][None],
        bounds=bounds,
        longest=longest,
    )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        fitting = (number for number, free in enumerate(room) if lengths[index] <= free)
        number = next(fitting, len(bins))
        if number == len(bins):
            bins.append([])
            room.append(capacity)
        bins[number].append(index)
        room[number] -= lengths[index]
    return bins


def _least_loaded(lengths: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Put each sequence, longest first, into the bin with the least in it; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in _longest_first(lengths):
        load, number = loads[0]
        if load and load + lengths[index] > capacity:
            return None
        bins[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return bins
