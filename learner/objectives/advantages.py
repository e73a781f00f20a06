"""How much better a trajectory did than its siblings: [B, 1], from the whole group, before any gate.

An episode counts once in the baseline, by the mean reward of its trajectories. A group of one episode has nothing to
compare with: its baseline is 0 and its scale 1, so its advantage is its reward.
"""

import torch
from torch import Tensor

from learner.objectives.objective import Advantage
from learner.tokens import Tokens


@Advantage
def no_baseline(tokens: Tokens) -> Tensor:
    """r."""
    return tokens.rewards[:, None]


@Advantage
def group_mean(tokens: Tokens) -> Tensor:
    """r - mean(r of the group)."""
    return _centred(tokens).float()[:, None]


@Advantage
def leave_one_out(tokens: Tokens) -> Tensor:
    """r - mean(r of the other episodes of the group) = n / (n - 1) * (r - mean) where an episode has one reward."""
    episodes = _episodes_in_group(tokens)
    factor = episodes / (episodes - 1).clamp(min=1)
    within_episode = tokens.rewards.double() - _episode_mean(tokens)
    return (factor * _centred(tokens) - (factor - 1) * within_episode).float()[:, None]


def standardised(*, lost_degrees: int, epsilon: float) -> Advantage:
    """(r - mean) / (std + epsilon), std = sqrt(sum of squares / (n - lost_degrees)); 1 is the sample std."""

    @Advantage
    def advantage(tokens: Tokens) -> Tensor:
        episodes, centred = _episodes_in_group(tokens), _centred(tokens)
        squares = _sum_over_group(tokens, centred.square())
        deviation = (squares / (episodes - lost_degrees)).sqrt()  # nan for one episode, which has no scale
        scale = torch.where(episodes > 1, deviation + epsilon, 1.0)
        return (centred / scale).float()[:, None]

    return advantage


@Advantage
def batch_normalised(tokens: Tokens) -> Tensor:
    """Whiten r - mean of the group over the batch: (x - mean) / (std + 1e-8), by trajectories (arXiv 2501.03262)."""
    centred = _centred(tokens)
    deviations = centred - centred.mean()  # groups of one, which have no mean of their own, are compared here
    return (deviations / (deviations.std(correction=0) + 1e-8)).float()[:, None]


def shifted(advantage: Advantage, *, by: float) -> Advantage:
    """advantage + by: above 0 it leans on good answers, below 0 on bad ones."""
    return Advantage(lambda tokens: advantage(tokens) + by, advantage.columns, advantage.reads_token_rewards)


def _centred(tokens: Tokens) -> Tensor:
    """[B] float64: rewards minus the group's mean; minus nothing in a group of one episode."""
    rewards = tokens.rewards.double()  # equal rewards must centre to 0, not to a rounding error that a std divides
    episodes = _episodes_in_group(tokens)
    mean = _sum_over_group(tokens, rewards) / episodes
    return rewards - torch.where(episodes > 1, mean, 0.0)


def _episodes_in_group(tokens: Tokens) -> Tensor:
    """[B] float64: distinct episodes of each trajectory's group."""
    return _sum_over_group(tokens, torch.ones_like(tokens.rewards, dtype=torch.float64)).round()


def _episode_mean(tokens: Tokens) -> Tensor:
    """[B] float64: the mean reward of each trajectory's episode."""
    is_member = (tokens.episode[:, None] == tokens.episode).double()
    return (is_member @ tokens.rewards.double()) / is_member.sum(-1)


def _sum_over_group(tokens: Tokens, values: Tensor) -> Tensor:
    """[B]: the sum of `values` over the episodes of each trajectory's group, an episode by its members' mean."""
    members = (tokens.episode[:, None] == tokens.episode).sum(-1)
    share = values / members
    return torch.zeros_like(values).index_add(0, tokens.group, share)[tokens.group]
