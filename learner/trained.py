"""Trained groups with their ratios, as the service shows them: cut from the batch that was just used."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from buffer.staleness import age_updates
from buffer.trained import MAX_TRAINED_GROUPS, TrainedGroup, TrainedTrajectory
from buffer.types import PolicyVersion, Sample


def trained_groups(
    samples: Sequence[Sample], log_ratios: Tensor, *, clock: PolicyVersion, max_tokens: int
) -> list[TrainedGroup]:
    """Return the groups of a batch, in its order, until one would go beyond `max_tokens` response tokens.

    `log_ratios` [B, T] float32 on the CPU, a row for each trajectory of the samples in order, 0 behind the mask.
    """
    groups: list[TrainedGroup] = []
    row, tokens = 0, 0
    for sample in samples[:MAX_TRAINED_GROUPS]:
        tokens += sample.group.num_response_tokens
        if tokens > max_tokens:
            break
        rows = log_ratios[row : row + len(sample.group.trajectories)].numpy()
        row += len(rows)
        groups.append(_trained(sample, rows, clock))
    return groups


def _trained(sample: Sample, log_ratios: "np.ndarray", clock: PolicyVersion) -> TrainedGroup:
    group = sample.group
    return TrainedGroup(
        group_id=group.group_id,
        prompt_id=group.prompt_id,
        version=clock,
        age_updates=age_updates(clock, group.oldest_version),
        times_sampled=sample.info.times_sampled,
        trajectories=tuple(
            TrainedTrajectory(
                trajectory_id=t.trajectory_id,
                prompt_ids=t.prompt_ids,
                response_ids=t.response_ids,
                response_mask=t.response_mask,
                behavior_logprobs=t.behavior_logprobs,
                log_ratios=ratios[: len(t.response_ids)],
                spans=t.spans,
                reward=t.reward,
            )
            for t, ratios in zip(group.trajectories, log_ratios, strict=True)
        ),
    )
