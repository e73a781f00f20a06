"""What a recipe pays for besides the policy gradient: Tokens -> [B, T], to be minimised."""

import math

import torch
from torch import Tensor

from learner.objectives.aggregation import masked
from learner.objectives.objective import TokenPiece
from learner.objectives.ratios import MAX_LOG_RATIO, bounded
from learner.tokens import Column, Tokens


def ratio_variance(ratio: TokenPiece) -> TokenPiece:
    """(ratio - 1)^2, of a bounded ratio: its gradient grows like ratio^2, so one outlier would own it."""

    def variance(tokens: Tokens) -> Tensor:
        values = tokens.once(ratio)
        one = values.new_ones(()).expand_as(values)
        return torch.nn.functional.mse_loss(values, one, reduction="none")  # two passes where a square has five

    return variance


def reference_k3(tokens: Tokens) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi) at temperature 1: estimates KL(pi || pi_ref) (arXiv 2402.03300).

    Guarded at log(pi_ref / pi) = 20, beyond which it has no gradient; the other side grows like -log and needs none.
    """
    logs = masked(tokens, tokens.columns[Column.REFERENCE_LOGPROBS] - tokens.columns[Column.UNIT_LOGPROBS])
    logs = bounded(logs, -math.inf, MAX_LOG_RATIO)
    return logs.expm1() - logs
