"""How wrong the surrogate can be: computable bounds on |J(pi) - J(behavior) - L| (arXiv 2512.23075).

For a reward in [0, 1] of the whole sequence and L = E_behavior[R sum_t (rho_t - 1)], which has the gradient of the loss
at the behaviour policy. With E over sequences that the behaviour policy draws, and c_t the context of token t = 1..T:

length       T, tokens of the longest sequence
max_tv       largest total variation of any context, epsilon
max_kl       largest KL(behavior || pi) of any context, in nats, delta
sequence_kl  KL of the laws of whole sequences, sum_t E[KL(c_t)]
sequence_tv  total variation of those laws
mean_tv      [T] float64: E[TV(c_t)], 0 where a sequence is over

A bound of 1 or more says nothing.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def classical(*, length: int, max_tv: float) -> float:
    """2 T (T - 1) epsilon^2."""
    return 2 * length * (length - 1) * max_tv**2


def coupling(*, length: int, max_tv: float) -> float:
    """4 min(1, epsilon) sum_t min(1, (t - 1) epsilon)."""
    return 4 * min(1.0, max_tv) * _sum_of_capped(_earlier(length) * max_tv)


def pinsker_marginal_kl(*, length: int, max_kl: float) -> float:
    """4 min(1, sqrt(delta / 2)) sum_t min(1, sqrt((t - 1) delta / 2)): PM-KL."""
    return pinsker_marginal_tv(length=length, max_tv=_pinsker(max_kl), max_kl=max_kl)


def pinsker_marginal_tv(*, length: int, max_tv: float, max_kl: float) -> float:
    """4 min(1, epsilon) sum_t min(1, sqrt((t - 1) delta / 2)): PM-TV."""
    return 4 * min(1.0, max_tv) * _sum_of_capped((_earlier(length) * (max_kl / 2)).sqrt())


def mixed_kl(*, length: int, max_kl: float, sequence_kl: float) -> float:
    """4 T min(1, sqrt(delta / 2)) min(1, sqrt(sequence_kl / 2)): Mix-KL."""
    return mixed_tv(length=length, max_tv=_pinsker(max_kl), sequence_tv=_pinsker(sequence_kl))


def mixed_tv(*, length: int, max_tv: float, sequence_tv: float) -> float:
    """4 T min(1, epsilon) min(1, sequence_tv): Mix-TV."""
    return 4 * length * min(1.0, max_tv) * min(1.0, sequence_tv)


def adaptive(*, mean_tv: Tensor, max_tv: float, max_kl: float) -> float:
    """4 sum_t mean_tv_t min(1, (T - t) epsilon, sqrt((T - t) delta / 2)): Adaptive*."""
    later = _earlier(len(mean_tv)).flip(0)
    reach = torch.minimum(later * max_tv, (later * (max_kl / 2)).sqrt()).clamp(max=1.0)
    return 4 * float(mean_tv @ reach)


def error_bounds(
    *, max_tv: float, max_kl: float, sequence_kl: float, sequence_tv: float, mean_tv: Tensor
) -> Mapping[str, float]:
    """Return every bound by name, and `best`, B*: the smallest of all but the classical one."""
    length = len(mean_tv)
    bounds = {
        "coupling": coupling(length=length, max_tv=max_tv),
        "pm_kl": pinsker_marginal_kl(length=length, max_kl=max_kl),
        "pm_tv": pinsker_marginal_tv(length=length, max_tv=max_tv, max_kl=max_kl),
        "mix_kl": mixed_kl(length=length, max_kl=max_kl, sequence_kl=sequence_kl),
        "mix_tv": mixed_tv(length=length, max_tv=max_tv, sequence_tv=sequence_tv),
        "adaptive": adaptive(mean_tv=mean_tv, max_tv=max_tv, max_kl=max_kl),
    }
    return {"classical": classical(length=length, max_tv=max_tv), **bounds, "best": min(bounds.values())}


def _earlier(length: int) -> Tensor:
    """[T] float64: t - 1, the tokens before t."""
    return torch.arange(length, dtype=torch.float64)


def _sum_of_capped(values: Tensor) -> float:
    return float(values.clamp(max=1.0).sum())


def _pinsker(kl: float) -> float:
    """The largest total variation that a KL in nats allows; 1 and more are no limit."""
    return math.sqrt(max(kl, 0.0) / 2)  # rounding can leave the KL of equal distributions a hair below 0
