"""Which tokens keep their gradient: (tokens, advantage) -> bool. A gate closes; it never changes a denominator."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from learner.objectives.aggregation import maximum_by_sequence, mean_by_sequence
from learner.objectives.objective import Gate, TokenPiece
from learner.objectives.ratios import k2, k3, log_ratio
from learner.tokens import Tokens


def sequence_maximum(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with max_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return maximum_by_sequence(tokens, statistic(tokens)) <= threshold

    return gate


def sequence_mean(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with mean_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return mean_by_sequence(tokens, statistic(tokens)) <= threshold

    return gate


def trust_region(*, max_k2: float, mean_k3: float) -> Mapping[str, Gate]:
    """arXiv 2512.23075 on sample stand-ins: one gate for each threshold that is not inf."""
    gates = {
        "trust_region_max": (max_k2, sequence_maximum(k2, threshold=max_k2)),
        "trust_region_mean": (mean_k3, sequence_mean(k3, threshold=mean_k3)),
    }
    return {name: gate for name, (threshold, gate) in gates.items() if math.isfinite(threshold)}


def inside_clip(ratio: TokenPiece, *, low: float, high: float) -> Gate:
    """Close tokens that already moved past the clip in the direction of their advantage."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = ratio(tokens)
        too_high = (advantage > 0) & (values > 1.0 + high)
        too_low = (advantage < 0) & (values < 1.0 - low)
        return ~(too_high | too_low)

    return gate


def inside_band(ratio: TokenPiece, *, low: float, high: float) -> Gate:
    """Close tokens whose ratio lies outside [low, high], whatever their advantage."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = ratio(tokens)
        return (values >= low) & (values <= high)

    return gate


def bounded_second_moment(*, threshold: float) -> Gate:
    """Close the tokens with the largest (log rho)^2 until the mean of the rest, over the batch, is below threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        squares = torch.where(tokens.mask, log_ratio(tokens).square(), torch.inf).flatten()
        ascending, order = squares.sort()
        means = ascending.cumsum(0) / torch.arange(1, len(squares) + 1, device=squares.device)
        return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, means < threshold).view_as(tokens.mask)

    return gate
