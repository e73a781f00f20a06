"""From values to one number, or one a sequence; the name states the denominator, which counts gated tokens too.

Values are finite behind the mask too, as what pieces make of cleaned tokens is.
"""

import torch
from torch import Tensor

from learner.tokens import Tokens


def mean_over_tokens(tokens: Tokens, values: Tensor) -> Tensor:
    """sum_{i,t} v / N: long sequences weigh more."""
    return masked(tokens, values).sum() / tokens.num_tokens.clamp(min=1)


def mean_over_sequences_of_means(tokens: Tokens, values: Tensor) -> Tensor:
    """1/B sum_i 1/|o_i| sum_t v: each sequence weighs the same."""
    means = masked(tokens, values).sum(-1) / tokens.lengths.clamp(min=1)
    return means.sum() / tokens.num_trajectories


def mean_over_sequences_of_sums(tokens: Tokens, values: Tensor) -> Tensor:
    """1/B sum_i sum_t v: the gradient of a sequence objective."""
    return masked(tokens, values).sum() / tokens.num_trajectories


def mean_over_sequences(tokens: Tokens, values: Tensor) -> Tensor:
    """1/B sum_i v_i, for values [B]."""
    return values.sum() / tokens.num_trajectories


def sum_over_sequences_per_token(tokens: Tokens, values: Tensor) -> Tensor:
    """sum_i v_i / N, for values [B]: the mean over sequences, divided by the mean length N / B."""
    return values.sum() / tokens.num_tokens.clamp(min=1)


def mean_by_sequence(tokens: Tokens, values: Tensor) -> Tensor:
    """[B, 1]: mean over trained tokens; 0 where there is none."""
    return masked(tokens, values).sum(-1, keepdim=True) / tokens.lengths.clamp(min=1)[:, None]


def sum_by_sequence(tokens: Tokens, values: Tensor) -> Tensor:
    """[B, 1]: sum over trained tokens."""
    return masked(tokens, values).sum(-1, keepdim=True)


def maximum_by_sequence(tokens: Tokens, values: Tensor) -> Tensor:
    """[B, 1]: max over trained tokens; -inf where there is none."""
    return torch.where(tokens.mask, values, -torch.inf).amax(-1, keepdim=True)


def masked(tokens: Tokens, values: Tensor) -> Tensor:
    """[B, T]: `values` at trained tokens, 0 elsewhere."""
    return values * tokens.weights
