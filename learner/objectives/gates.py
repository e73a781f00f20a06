"""Which tokens keep their gradient: (tokens, advantage) -> bool. A gate closes; it never changes a denominator."""

import torch
from torch import Tensor

from learner.objectives.objective import Gate, TokenPiece
from learner.tokens import Tokens


def sequence_maximum(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with max_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return maximum_by_sequence(tokens, statistic) <= threshold

    return gate


def sequence_mean(statistic: TokenPiece, *, threshold: float) -> Gate:
    """Keep whole sequences with mean_t statistic <= threshold."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return mean_by_sequence(tokens, statistic) <= threshold

    return gate


def inside_clip(ratio: TokenPiece, *, low: float, high: float) -> Gate:
    """Close tokens that already moved past the clip in the direction of their advantage."""

    def gate(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = ratio(tokens)
        too_high = (advantage > 0) & (values > 1.0 + high)
        too_low = (advantage < 0) & (values < 1.0 - low)
        return ~(too_high | too_low)

    return gate


def maximum_by_sequence(tokens: Tokens, statistic: TokenPiece) -> Tensor:
    """[B, 1]: max over trained tokens; -inf where there is none."""
    return statistic(tokens).masked_fill(~tokens.mask, -torch.inf).amax(-1, keepdim=True)


def mean_by_sequence(tokens: Tokens, statistic: TokenPiece) -> Tensor:
    """[B, 1]: mean over trained tokens; 0 where there is none."""
    sums = statistic(tokens).masked_fill(~tokens.mask, 0.0).sum(-1, keepdim=True)
    return sums / tokens.lengths.clamp(min=1)[:, None]
