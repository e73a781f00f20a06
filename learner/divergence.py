"""How far apart two whole distributions over the vocabulary are, per token; no gradient.

Legend: n tokens, V vocabulary. Both sides are log-probs [n, V], -inf where a token cannot be drawn.
"""

import torch
from torch import Tensor

_SMALLEST_REST = torch.finfo(torch.float32).eps
"""Float32 cannot tell a smaller rest of 1 from none; a larger one only lowers the bound."""


@torch.no_grad()
def kl_divergence(behavior: Tensor, policy: Tensor) -> Tensor:
    """KL(behavior || policy) [n] in nats, clamped at 0: rounding may take equal rows below it."""
    return _kl_terms(behavior, policy).sum(-1).clamp(min=0.0)


@torch.no_grad()
def total_variation(behavior: Tensor, policy: Tensor) -> Tensor:
    """1/2 sum |behavior - policy| [n], in [0, 1]."""
    return ((behavior.exp() - policy.exp()).abs().sum(-1) / 2).clamp(max=1.0)


@torch.no_grad()
def kl_lower_bound(behavior: Tensor, policy: Tensor) -> Tensor:
    """What the listed ids prove of KL(behavior || policy) [n], the unlisted ones (-inf) lumped into one event.

    By the log-sum inequality lumping never raises a KL; with all ids listed it is the KL.
    """
    listed = behavior > -torch.inf
    rest = (1.0 - behavior.exp().sum(-1)).clamp(min=0.0)
    policy_rest = (1.0 - torch.where(listed, policy.exp(), 0.0).sum(-1)).clamp(min=_SMALLEST_REST)
    return (_kl_terms(behavior, policy).sum(-1) + torch.xlogy(rest, rest / policy_rest)).clamp(min=0.0)


def _kl_terms(behavior: Tensor, policy: Tensor) -> Tensor:
    return torch.where(behavior > -torch.inf, behavior.exp() * (behavior - policy), 0.0)
