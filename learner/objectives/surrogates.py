"""What a policy gradient ascends, token by token: (tokens, advantage) -> [B, T]."""

import torch
from torch import Tensor

from learner.objectives.objective import Surrogate, TokenPiece
from learner.tokens import Tokens


def score(weight: TokenPiece) -> Surrogate:
    """sg[weight] * A * log pi: gradient through log pi alone."""
    return lambda tokens, advantage: _without_gradient(weight, tokens) * advantage * tokens.logprobs


def weighted(surrogate: Surrogate, weight: TokenPiece) -> Surrogate:
    """sg[weight] * surrogate."""
    return lambda tokens, advantage: _without_gradient(weight, tokens) * surrogate(tokens, advantage)


def tapered_score(weight: TokenPiece) -> Surrogate:
    """A * log pi where A >= 0, and sg[weight] * A * log pi where A < 0 (arXiv 2503.14286)."""

    def surrogate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return torch.where(advantage < 0, _without_gradient(weight, tokens), 1.0) * advantage * tokens.logprobs

    return surrogate


def importance(ratio: TokenPiece) -> Surrogate:
    """ratio * A."""
    return lambda tokens, advantage: tokens.once(ratio) * advantage


def hard_clip(ratio: TokenPiece, *, low: float, high: float) -> Surrogate:
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), PPO's pessimistic clip: it binds on one side only."""

    def surrogate(tokens: Tokens, advantage: Tensor) -> Tensor:
        return tokens.once(ratio).clamp(*pessimistic_bounds(advantage, low=low, high=high)) * advantage

    return surrogate


def pessimistic_bounds(advantage: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where PPO's clip binds: from above at 1 + high where A > 0, from below at 1 - low where A < 0."""
    return torch.where(advantage < 0, 1.0 - low, -torch.inf), torch.where(advantage > 0, 1.0 + high, torch.inf)


def dual_clip(surrogate: Surrogate, *, floor: float) -> Surrogate:
    """max(surrogate, floor * A) where A < 0: one wild ratio cannot own the gradient (arXiv 1912.09729)."""

    def clipped(tokens: Tokens, advantage: Tensor) -> Tensor:
        values = surrogate(tokens, advantage)
        return torch.where(advantage < 0, torch.maximum(values, floor * advantage), values)

    return clipped


@torch.no_grad()
def _without_gradient(weight: TokenPiece, tokens: Tokens) -> Tensor:
    return weight(tokens).detach()
