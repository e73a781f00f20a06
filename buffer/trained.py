"""What became of a group that was trained on: its tokens with the ratios of the update, to be looked at later."""

from typing import Annotated, Self

from pydantic import Field, FiniteFloat, model_validator

from buffer.arrays import BoolArray, Float32Array, Int32Array
from buffer.types import MAX_ITEMS, Identifier, PolicyVersion, Record, VersionSpan

MAX_TRAINED_GROUPS = 256
"""Groups of one report at most, and groups that a service remembers."""


class TrainedTrajectory(Record):
    """One response with its ratios. T response tokens; arrays are 0 where `response_mask` is False."""

    trajectory_id: Identifier
    prompt_ids: Int32Array
    response_ids: Int32Array  # [T]
    response_mask: BoolArray  # [T]
    behavior_logprobs: Float32Array  # [T]
    log_ratios: Float32Array
    """[T] log pi / behavior, in nats, before the update moved the weights."""
    spans: Annotated[tuple[VersionSpan, ...], Field(max_length=MAX_ITEMS, strict=False)]
    reward: FiniteFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {len(self.response_mask), len(self.behavior_logprobs), len(self.log_ratios)}
        if lengths != {len(self.response_ids)}:
            raise ValueError("response_ids, response_mask, behavior_logprobs and log_ratios must have one length")
        return self


class TrainedGroup(Record):
    """A group as the learner trained on it. It may have left the table since."""

    group_id: Identifier
    prompt_id: Identifier
    version: Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
    """The learner's clock before the update."""
    age_updates: int | None
    """Of the group when it was trained on; null for data that our weights did not draw."""
    times_sampled: int
    """How often it had been handed out, this time included."""
    trajectories: Annotated[tuple[TrainedTrajectory, ...], Field(min_length=1, max_length=MAX_ITEMS, strict=False)]

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all trajectories, masked ones included."""
        return sum(len(trajectory.response_ids) for trajectory in self.trajectories)

    def summary(self) -> "TrainedSummary":
        """Return the group without its tokens."""
        largest = max(
            (float(abs(t.log_ratios).max()) for t in self.trajectories if len(t.log_ratios)),
            default=0.0,
        )
        return TrainedSummary(
            group_id=self.group_id,
            prompt_id=self.prompt_id,
            version=self.version,
            age_updates=self.age_updates,
            times_sampled=self.times_sampled,
            num_trajectories=len(self.trajectories),
            num_response_tokens=self.num_response_tokens,
            mean_reward=sum(t.reward for t in self.trajectories) / len(self.trajectories),
            log_ratio_absolute_max=largest,
        )


class TrainedSummary(Record):
    """A trained group without its tokens."""

    group_id: Identifier
    prompt_id: Identifier
    version: PolicyVersion
    age_updates: int | None
    times_sampled: int
    num_trajectories: int
    num_response_tokens: int
    mean_reward: float
    log_ratio_absolute_max: float
    """Largest |log pi / behavior| of a token, in nats."""


class TrainedPage(Record):
    """The groups trained on of late, newest first."""

    groups: list[TrainedSummary]
