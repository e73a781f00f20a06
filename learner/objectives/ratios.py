"""How far the policy has moved from the one that drew a token: [B, T] or [B, 1], float32, exponentiated last."""

import math
from typing import Any

import torch
from torch import Tensor

from learner.objectives.aggregation import mean_by_sequence, sum_by_sequence
from learner.objectives.objective import TokenPiece
from learner.tokens import Column, Tokens, as_weights

MAX_LOG_RATIO = 20.0
"""Guard before exp: exp(20) = 4.9e8 is beyond any useful ratio, and the square of a product of two of them, exp(80),
is still finite in float32. Outside the guard a ratio has no gradient."""


def log_ratio(tokens: Tokens) -> Tensor:
    """log rho = log pi - log behavior, within +-MAX_LOG_RATIO; 0 behind the mask."""
    return tokens.once(_log_ratio)


def no_ratio(tokens: Tokens) -> Tensor:
    """[B, 1]: 1, the data is taken as if the policy itself had drawn it."""
    return torch.ones_like(tokens.rewards)[:, None]


def token_ratio(tokens: Tokens) -> Tensor:
    """rho; 1 behind the mask."""
    return tokens.once(_token_ratio)


def bounded_ratio(*, max_log_ratio: float) -> TokenPiece:
    """rho with |log rho| <= max_log_ratio; outside it has no gradient."""
    bound = math.exp(min(max_log_ratio, MAX_LOG_RATIO))
    return lambda tokens: bounded(token_ratio(tokens), 1.0 / bound, bound)


def sequence_ratio(tokens: Tokens) -> Tensor:
    """[B, 1]: exp(mean_t log rho), the geometric mean of a sequence's ratios (arXiv 2507.18071)."""
    return mean_by_sequence(tokens, log_ratio(tokens)).exp()


def sequence_product(tokens: Tokens) -> Tensor:
    """[B, 1]: prod_t rho, within the same guard as one ratio."""
    return _guarded(sum_by_sequence(tokens, log_ratio(tokens))).exp()


def proximal_ratio(tokens: Tokens) -> Tensor:
    """pi / proximal: the drift of the policy since the trainer scored the tokens itself."""
    return _guarded(tokens.logprobs - tokens.columns[Column.PROXIMAL_LOGPROBS]).exp()


def proximal_to_behavior(tokens: Tokens) -> Tensor:
    """proximal / behavior: staleness and the gap between engine and trainer."""
    return _guarded(tokens.columns[Column.PROXIMAL_LOGPROBS] - tokens.behavior_logprobs).exp()


def prefix_minimum(tokens: Tokens) -> Tensor:
    """sg[min_{i < t} rho_i] over the trained tokens before t; 1 where there is none, holes are transparent."""
    inclusive = torch.where(tokens.mask, token_ratio(tokens).detach(), math.inf).cummin(-1).values
    exclusive = torch.nn.functional.pad(inclusive[:, :-1], (1, 0), value=1.0)
    return exclusive.nan_to_num_(posinf=1.0)  # inf: masked tokens alone before it


def prefix_ratio(tokens: Tokens) -> Tensor:
    """sg[min_{i < t} rho_i] * rho_t."""
    return prefix_minimum(tokens) * token_ratio(tokens)


def capped_prefix_ratio(tokens: Tokens) -> Tensor:
    """sg[min(1, min_{i < t} rho_i)] * rho_t: a good prefix never amplifies."""
    return prefix_minimum(tokens).clamp(max=1.0) * token_ratio(tokens)


def soft_clip(ratio: TokenPiece, *, low: float, high: float) -> TokenPiece:
    """clip(ratio, 1 - low, 1 + high), a weight: it bounds a coefficient and drops no token."""
    return lambda tokens: ratio(tokens).clamp(1.0 - low, 1.0 + high)


def truncated(ratio: TokenPiece, *, cap: float) -> TokenPiece:
    """min(ratio, cap), a weight."""
    return lambda tokens: ratio(tokens).clamp(max=cap)


def banded(ratio: TokenPiece, *, low: float, high: float) -> TokenPiece:
    """ratio inside [low, high], 0 outside, a weight."""

    def weight(tokens: Tokens) -> Tensor:
        values = tokens.once(ratio)
        return values * as_weights((values >= low) & (values <= high))

    return weight


def deviation(tokens: Tokens) -> Tensor:
    """|rho - 1|: half of it is unbiased for the total variation of behavior and pi."""
    return log_ratio(tokens).expm1().abs()


def column(name: Column) -> TokenPiece:
    """A column [B, T] as it is."""
    return lambda tokens: tokens.columns[name]


def k1(tokens: Tokens) -> Tensor:
    """-log rho: unbiased for KL(behavior || pi), of either sign."""
    return -log_ratio(tokens)


def k2(tokens: Tokens) -> Tensor:
    """(log rho)^2 / 2: symmetric, so that it sees both tails."""
    return log_ratio(tokens).square() / 2


def k3(tokens: Tokens) -> Tensor:
    """rho - 1 - log rho: unbiased for KL(behavior || pi), never negative."""
    logs = log_ratio(tokens)
    return logs.expm1() - logs


def bounded(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high]; outside it has no gradient."""
    result: Tensor = _Bounded.apply(values, low, high)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def _log_ratio(tokens: Tokens) -> Tensor:
    logs = tokens.logprobs - tokens.behavior_logprobs
    logs.detach().mul_(tokens.weights)  # in place and not differentiated: every sum masks the gradient
    return _guarded(logs)


def _token_ratio(tokens: Tokens) -> Tensor:
    return log_ratio(tokens).exp()


def _guarded(logs: Tensor) -> Tensor:
    return bounded(logs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


class _Bounded(torch.autograd.Function):
    """hardtanh whose backward reads its result: the input is free again, and clamp's four passes are one."""

    @staticmethod
    def forward(context: Any, values: Tensor, low: float, high: float) -> Tensor:
        result = torch.nn.functional.hardtanh(values, low, high)
        context.save_for_backward(result)
        context.limits = low, high
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (result,) = context.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, result, *context.limits), None, None
