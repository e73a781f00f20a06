"""Which tokens keep their gradient: (tokens, advantage) -> bool. A gate closes; it never changes a denominator."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from learner.objectives.aggregation import maximum_by_sequence, mean_by_sequence, sum_by_sequence
from learner.objectives.objective import Gate, TokenPiece
from learner.objectives.ratios import column, deviation, k3, log_ratio
from learner.objectives.surrogates import pessimistic_bounds
from learner.tokens import Column, Tokens


def sequence_maximum(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with max_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return maximum_by_sequence(tokens, statistic(tokens)) <= threshold

    return gate


def sequence_largest_k2(*, threshold: float) -> Gate:
    """Keep whole sequences with max_t k2 <= threshold; k2 grows with |log rho|, which is 0 behind the mask."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        logs = log_ratio(tokens)
        largest = torch.maximum(logs.amax(-1, keepdim=True), -logs.amin(-1, keepdim=True))
        return largest.square() / 2 <= threshold

    return gate


def sequence_mean(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with mean_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return mean_by_sequence(tokens, statistic(tokens)) <= threshold

    return gate


def trust_region(
    *,
    max_k2: float = math.inf,
    mean_k3: float = math.inf,
    max_kl: float = math.inf,
    mean_kl: float = math.inf,
    kl: Column = Column.EXACT_KL,
) -> Mapping[str, Gate]:
    """arXiv 2512.23075: one gate for each threshold that is not inf.

    k2 and k3 are sample stand-ins, and their gates are named estimates; max_kl and mean_kl read the column `kl`.
    """
    proven = "_lower_bound" if kl is Column.KL_LOWER_BOUND else ""
    gates = {
        "trust_region_max_estimate": (max_k2, sequence_largest_k2(threshold=max_k2)),
        "trust_region_mean_estimate": (mean_k3, sequence_mean(k3, threshold=mean_k3)),
        f"trust_region_max{proven}": (max_kl, sequence_maximum(column(kl), threshold=max_kl)),
        f"trust_region_mean{proven}": (mean_kl, sequence_mean(column(kl), threshold=mean_kl)),
    }
    return {name: gate for name, (threshold, gate) in gates.items() if math.isfinite(threshold)}


def where_bad(gate: Gate) -> Gate:
    """Apply a gate where A < 0 and leave the rest open: what was good can be learnt however unlikely it has become."""

    def of_the_bad(tokens: Tokens, advantage: Tensor) -> Tensor:
        return gate(tokens, advantage) | (advantage >= 0)

    return of_the_bad


def length_neutral(*, epsilon: float, delta: float, threshold: float) -> Gate:
    """Keep whole sequences with sum_t w_t |rho_t - 1| <= threshold * sum_t w_t, t = 1..T the trained tokens.

    w_t = min(1, (T - t) epsilon, sqrt((T - t) delta / 2)): what a token can do to the tokens after it, so that the last
    one is free and one threshold serves all lengths (arXiv 2512.23075).
    """

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        later = tokens.lengths[:, None] - tokens.mask.cumsum(-1, dtype=torch.float32)  # T - t
        weight = torch.minimum(later * epsilon, (later * (delta / 2)).sqrt()).clamp(max=1.0)
        return sum_by_sequence(tokens, weight * deviation(tokens)) <= threshold * sum_by_sequence(tokens, weight)

    return gate


def inside_clip(ratio: TokenPiece, *, low: float, high: float) -> Gate:
    """Close tokens that already moved past the clip in the direction of their advantage."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = tokens.once(ratio)
        lowest, highest = pessimistic_bounds(advantage, low=low, high=high)
        return (values >= lowest) & (values <= highest)

    return gate


def inside_dual_clip(ratio: TokenPiece, *, floor: float) -> Gate:
    """Close bad tokens whose ratio is above `floor`."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return (tokens.once(ratio) <= floor) | (advantage >= 0)

    return gate


def inside_band(ratio: TokenPiece, *, low: float, high: float) -> Gate:
    """Close tokens whose ratio lies outside [low, high], whatever their advantage."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = tokens.once(ratio)
        return (values >= low) & (values <= high)

    return gate


def bounded_second_moment(*, threshold: float) -> Gate:
    """Close the tokens with the largest (log rho)^2 until the mean of the rest, over the batch, is below threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        squares = log_ratio(tokens).square()
        is_small = squares < threshold  # a mean of these is below the threshold: only the others need an order
        small = tokens.mask & is_small
        large = tokens.mask & ~is_small
        ascending, order = squares[large].sort()
        ranks = torch.arange(1, len(order) + 1, device=order.device)
        total = torch.where(small, squares, 0.0).sum(dtype=torch.float64)
        means = (total + ascending.cumsum(0, dtype=torch.float64)) / (small.sum() + ranks)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, means < threshold)
        return small.masked_scatter(large, kept)

    return gate
