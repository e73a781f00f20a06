"""The optimal token baseline: at each token, siblings count by the gradient that they have gathered (arXiv 2602.07078).

Siblings are aligned by the number of trained tokens before, so that a hole in the mask moves nothing. An episode counts
once, as the mean of those of its members that are still alive; where one episode alone is alive, the baseline is 0.
"""

import torch
from torch import Tensor

from learner.objectives.objective import Advantage, TokenPiece
from learner.tokens import Column, Tokens

_ENERGY_FLOOR = 1e-8
"""Weight of the plain mean beside the energies: where all of them vanish, as after a prefix that every sibling was sure
of, the baseline is the mean of the siblings (the paper's same epsilon draws it to 0)."""


def optimal_token_baseline(*, weight: TokenPiece | None = None) -> Advantage:
    """[B, T]: G_t - sum_i G_it W_it / sum_i W_it over the group, W_t = sum_{s <= t} |d log pi / d logits|^2 weight^2.

    G_t is the reward plus the token rewards from t on; `weight` is 1 when left out.
    """

    def compute(tokens: Tokens) -> Tensor:
        energies = squared_logit_gradient(tokens)
        if weight is not None:
            energies = energies * weight(tokens).detach().double().square()
        energies = _masked(tokens, energies).cumsum(-1)
        returns = _reward_to_go(tokens)
        places = _places(tokens.group, tokens)
        # members of one episode at one place share its single vote
        votes = 1.0 / _sums_by_place(_places(tokens.episode, tokens), tokens, torch.ones_like(returns))
        weights = votes * (energies + _ENERGY_FLOOR)
        baseline = _sums_by_place(places, tokens, weights * returns) / _sums_by_place(places, tokens, weights)
        alive = _sums_by_place(places, tokens, votes).round()  # episodes
        return _masked(tokens, returns - torch.where(alive > 1, baseline, 0.0)).float()

    return Advantage(compute, frozenset({Column.OTHER_SQUARED_PROBS}), reads_token_rewards=True)


def squared_logit_gradient(tokens: Tokens) -> Tensor:
    """[B, T] float64: |d log pi(y) / d logits|^2 = (1 - pi(y))^2 + sum_{v != y} pi(v)^2, with nothing to cancel."""
    missing = tokens.logprobs.detach().double().expm1()
    return missing.square() + tokens.columns[Column.OTHER_SQUARED_PROBS].double()


def _reward_to_go(tokens: Tokens) -> Tensor:
    """[B, T] float64: what is still to come at a token; the reward of a trajectory comes after its last one."""
    rewards = tokens.rewards.double()[:, None].expand(tokens.mask.shape)
    if tokens.token_rewards is None:
        return rewards
    later = _masked(tokens, tokens.token_rewards.double()).flip(-1).cumsum(-1).flip(-1)
    return rewards + later


def _places(owner: Tensor, tokens: Tokens) -> Tensor:
    """[B, T] int64 in [0, B * T): one number for each owner and each count of trained tokens before."""
    before = tokens.mask.cumsum(-1) - tokens.mask.long()
    return owner[:, None] * tokens.mask.shape[1] + before


def _sums_by_place(places: Tensor, tokens: Tokens, values: Tensor) -> Tensor:
    """[B, T] float64: at each trained token, the sum of `values` over the trained tokens at its place."""
    sums = values.new_zeros(places.numel()).index_add(0, places.flatten(), _masked(tokens, values).flatten())
    return sums[places]


def _masked(tokens: Tokens, values: Tensor) -> Tensor:
    """[B, T]: 0 behind the mask, where 1 / 0 and expm1 of what stands there may have made inf."""
    return torch.where(tokens.mask, values, 0.0)
