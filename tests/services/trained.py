"""Trained groups made by hand."""

import numpy as np

from buffer.trained import TrainedGroup, TrainedTrajectory
from buffer.types import VersionSpan


def make_trained(group_id: str, *, num_tokens: int = 3, version: int = 5) -> TrainedGroup:
    """Return a group of one trajectory whose last token is twice as likely as when it was drawn."""
    ratios = np.zeros(num_tokens, np.float32)
    ratios[-1] = np.log(2)
    trajectory = TrainedTrajectory(
        trajectory_id="t",
        prompt_ids=np.asarray([5, 6], np.int32),
        response_ids=np.full(num_tokens, 8, np.int32),
        response_mask=np.ones(num_tokens, np.bool_),
        behavior_logprobs=np.full(num_tokens, -0.5, np.float32),
        log_ratios=ratios,
        spans=(VersionSpan(start=0, end=num_tokens, version=version - 2),),
        reward=1.0,
    )
    return TrainedGroup(
        group_id=group_id, prompt_id="p", version=version, age_updates=2, times_sampled=1, trajectories=(trajectory,)
    )
