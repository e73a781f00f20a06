"""What a recipe pays for besides the policy gradient: Tokens -> [B, T], to be minimised."""

from torch import Tensor

from learner.objectives.objective import TokenPiece
from learner.objectives.ratios import bounded, log_ratio
from learner.tokens import Column, Tokens


def ratio_variance(*, max_log_ratio: float) -> TokenPiece:
    """(rho - 1)^2 with |log rho| <= max_log_ratio: its gradient grows like rho^2, so one outlier would own it."""
    return lambda tokens: bounded(log_ratio(tokens), max_log_ratio).expm1().square()


def reference_k3(tokens: Tokens) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi) at temperature 1: estimates KL(pi || pi_ref) (arXiv 2402.03300)."""
    logs = tokens.columns[Column.REFERENCE_LOGPROBS] - tokens.columns[Column.UNIT_LOGPROBS]
    return logs.expm1() - logs
