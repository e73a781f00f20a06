"""How far the policy is from soft Bellman consistency: Tokens -> [B], scaled units, temperature 1.

Per trajectory the consistency telescopes to V(s_1) + log pi(tau) - log pi_ref(tau) - r / beta = 0, with the logits as
Q-values and V their logsumexp. As V(s_1) + log pi(a_1|s_1) = logit(s_1, a_1), one raw logit carries V: s_1 is the first
position with mask True, and no [B, T, V] tensor is needed. Nothing is detached: V learns.
"""

import torch
from torch import Tensor

from learner.objectives.aggregation import masked
from learner.objectives.objective import Advantage, SequencePiece
from learner.tokens import Column, Tokens

TBRM_COLUMNS = frozenset({Column.UNIT_LOGPROBS, Column.REFERENCE_LOGPROBS, Column.FIRST_LOGIT})
REVAL_COLUMNS = TBRM_COLUMNS | {Column.REFERENCE_FIRST_LOGIT}


def reval_residual(*, beta: float, centred: Advantage) -> SequencePiece:
    """logit(a_1) - logit_ref(a_1) + sum_{t >= 2} [log pi - log pi_ref] - r / beta, r centred (arXiv 2603.23355)."""

    def residual(tokens: Tokens) -> Tensor:
        value = tokens.columns[Column.FIRST_LOGIT] - tokens.columns[Column.REFERENCE_FIRST_LOGIT]
        return value + log_ratio_to_reference_after_first(tokens) - centred(tokens)[:, 0] / beta

    return residual


def tbrm_residual(*, beta: float) -> SequencePiece:
    """logit(a_1) + sum_{t >= 2} log pi - log pi_ref(tau) - r / beta: the same without V_ref (arXiv 2505.15311)."""

    def residual(tokens: Tokens) -> Tensor:
        reference = masked(tokens, tokens.columns[Column.REFERENCE_LOGPROBS]).gather(-1, first_position(tokens))[:, 0]
        value = tokens.columns[Column.FIRST_LOGIT] - reference
        return value + log_ratio_to_reference_after_first(tokens) - tokens.rewards / beta

    return residual


def log_ratio_to_reference_after_first(tokens: Tokens) -> Tensor:
    """[B]: sum over the trained tokens but the first of log pi - log pi_ref at temperature 1."""
    later = tokens.weights.scatter(-1, first_position(tokens), 0.0)
    return (tokens.columns[Column.UNIT_LOGPROBS] - tokens.columns[Column.REFERENCE_LOGPROBS]).mul_(later).sum(-1)


def first_position(tokens: Tokens) -> Tensor:
    """[B, 1]: the first position with mask True; the last where there is none."""
    length = tokens.mask.shape[1]
    to_end = torch.arange(length, 0, -1, dtype=torch.float32, device=tokens.mask.device)
    nearest = (tokens.weights * to_end).amax(-1, keepdim=True)  # argmax of a mask is four times as slow
    return (length - nearest).clamp(max=length - 1).long()
