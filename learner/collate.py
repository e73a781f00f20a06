"""Whole groups to one padded batch: numbering, ages and alignment; every trajectory of every group is in it.

Legend: B trajectories, S sequence positions (prompt + response), T response positions, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from buffer.staleness import age_updates
from buffer.types import PolicyVersion, Sample, Trajectory

NO_AGE = -1
"""Age of a token that is masked or that our weights did not draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The support that truncated sampling left to one response."""

    token_ids: Tensor  # [K] int64, token after token
    counts: Tensor  # [T_i] int64, how many of them belong to each response token


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What the engine drew the tokens of one response from."""

    logprobs: Tensor  # [K] float32, in line with `kept`; [T_i, V] where that is None
    kept: Kept | None
    complete: bool  # False: the kept ids are a part of what could be drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One update's data, on the CPU. Right-padded: P P a a e a _ _ -> mask [1, 1, 0, 1, 0, 0]  (e = tool output)."""

    token_ids: Tensor  # [B, S] int64, prompt then response, padded with 0
    prompt_lengths: Tensor  # [B] int64
    sequence_lengths: Tensor  # [B] int64, prompt and response
    mask: Tensor  # [B, T] bool
    behavior_logprobs: Tensor  # [B, T] float32, 0 behind the mask
    age_updates: Tensor  # [B, T] int64, NO_AGE where masked or foreign
    rewards: Tensor  # [B] float32
    token_rewards: Tensor | None  # [B, T] float32, 0 for trajectories without; None when no trajectory has them
    group: Tensor  # [B] int64 in [0, G)
    episode: Tensor  # [B] int64, numbered over the batch
    temperature: Tensor  # [B] float32
    kept: tuple[Kept | None, ...]  # B entries; None where sampling did not truncate
    distributions: tuple[Distribution | None, ...]  # B entries; None where the engine did not ship them
    keys: tuple[tuple[str, str], ...]  # B entries: group_id, trajectory_id
    group_ages_updates: tuple[int | None, ...]  # G entries; None for foreign groups
    times_sampled: tuple[int, ...]  # G entries, this draw included
    draw_rates: tuple[float, ...]  # G entries: N p, how often a group comes for each time it would in uniform draws

    def aged(self, updates: int) -> "Batch":
        """Return the batch as it is so many updates of the learner's clock later."""
        own = self.age_updates != NO_AGE
        return replace(
            self,
            age_updates=torch.where(own, self.age_updates + updates, NO_AGE),
            group_ages_updates=tuple(None if age is None else age + updates for age in self.group_ages_updates),
        )


def collate(samples: Sequence[Sample], *, clock: PolicyVersion) -> Batch:
    """Pad the groups of one draw into a batch, with ages against the learner's clock. Groups must be distinct."""
    groups = [sample.group for sample in samples]
    assert groups, "a batch needs at least one group"
    assert len({group.group_id for group in groups}) == len(groups), "a group was drawn twice for one batch"
    rows = [(index, trajectory) for index, group in enumerate(groups) for trajectory in group.trajectories]
    trajectories = [trajectory for _, trajectory in rows]
    return Batch(
        token_ids=_pad([np.concatenate([t.prompt_ids, t.response_ids]) for t in trajectories], torch.int64, 0),
        prompt_lengths=torch.tensor([len(t.prompt_ids) for t in trajectories]),
        sequence_lengths=torch.tensor([len(t.prompt_ids) + len(t.response_ids) for t in trajectories]),
        mask=_pad([t.response_mask for t in trajectories], torch.bool, False),
        behavior_logprobs=_pad([t.behavior_logprobs for t in trajectories], torch.float32, 0.0),
        age_updates=_pad([_ages(t, clock) for t in trajectories], torch.int64, NO_AGE),
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        token_rewards=_token_rewards(trajectories),
        group=torch.tensor([index for index, _ in rows]),
        episode=_number_episodes(rows),
        temperature=torch.tensor([t.sampling.temperature for t in trajectories], dtype=torch.float32),
        kept=tuple(_kept(t) if t.sampling.truncates else None for t in trajectories),
        distributions=tuple(_distribution(t) for t in trajectories),
        keys=tuple((groups[index].group_id, t.trajectory_id) for index, t in rows),
        group_ages_updates=tuple(age_updates(clock, group.oldest_version) for group in groups),
        times_sampled=tuple(sample.info.times_sampled for sample in samples),
        draw_rates=tuple(sample.info.num_candidates * sample.info.probability for sample in samples),
    )


def _pad(arrays: Sequence[np.ndarray], dtype: torch.dtype, fill: float) -> Tensor:
    padded = torch.full((len(arrays), max(len(array) for array in arrays)), fill, dtype=dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = torch.tensor(array)  # a copy: wire arrays are read-only
    return padded


def _ages(trajectory: Trajectory, clock: PolicyVersion) -> np.ndarray:
    ages = np.full(len(trajectory.response_ids), NO_AGE, np.int64)
    for span in trajectory.spans:
        if span.version is not None:
            ages[span.start : span.end] = clock - span.version
    ages[~trajectory.response_mask] = NO_AGE
    return ages


def _token_rewards(trajectories: Sequence[Trajectory]) -> Tensor | None:
    if all(t.token_rewards is None for t in trajectories):
        return None
    rewards = [np.zeros(len(t.response_ids)) if t.token_rewards is None else t.token_rewards for t in trajectories]
    return _pad(rewards, torch.float32, 0.0)


def _number_episodes(rows: Sequence[tuple[int, Trajectory]]) -> Tensor:
    """Give members of one episode of a group one number, and each trajectory without episode its own."""
    numbers: dict[tuple[int, str, bool], int] = {}
    return torch.tensor(
        [
            numbers.setdefault(
                (index, t.episode_id or t.trajectory_id, t.episode_id is None),
                len(numbers),
            )
            for index, t in rows
        ]
    )


def _kept(trajectory: Trajectory) -> Kept | None:
    if trajectory.kept_token_ids is None or trajectory.kept_token_counts is None:
        return None
    return Kept(
        token_ids=torch.tensor(trajectory.kept_token_ids, dtype=torch.int64),
        counts=torch.tensor(trajectory.kept_token_counts, dtype=torch.int64),
    )


def _distribution(trajectory: Trajectory) -> Distribution | None:
    if trajectory.distribution_logprobs is None:
        return None
    kept, logprobs = _kept(trajectory), torch.tensor(trajectory.distribution_logprobs)
    return Distribution(
        logprobs=logprobs.view(len(trajectory.response_ids), -1) if kept is None else logprobs,
        kept=kept,
        complete=trajectory.distribution_is_complete,
    )
