"""Micro-batches hold every sequence once, within the budget, nearly full, and as many for each rank."""

import random

import pytest

from learner.packing import pack


def _lengths(number: int) -> list[int]:
    draw = random.Random(0)
    return [min(8192, max(64, int(draw.lognormvariate(6.4, 1.0)))) for _ in range(number)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_sequence_is_in_one_bin_within_the_budget(num_ranks: int) -> None:
    lengths = _lengths(200)
    bins = pack(lengths, 16_384, num_ranks=num_ranks)

    assert sorted(index for members in bins for index in members) == list(range(200))
    assert max(sum(lengths[index] for index in members) for members in bins) <= 16_384
    assert len(bins) % num_ranks == 0


def test_bins_are_nearly_full() -> None:
    lengths = _lengths(512)

    assert sum(lengths) / (16_384 * len(pack(lengths, 16_384))) >= 0.97


def test_ranks_have_nearly_equal_work() -> None:
    lengths = _lengths(200)
    bins = pack(lengths, 16_384, num_ranks=4)
    loads = [sum(lengths[index] for members in bins[rank::4] for index in members) for rank in range(4)]

    assert max(loads) <= 1.02 * min(loads)


def test_a_sequence_over_the_budget_is_alone_and_fewer_sequences_than_ranks_leave_bins_empty() -> None:
    assert pack([5, 50, 4], 10) == [[1], [0, 2]]
    assert pack([50, 4], 10, num_ranks=4) == [[0], [1], [], []]
