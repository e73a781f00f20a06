"""The records that cross the wire: one definition for validation, JSON schema, msgpack and Python.

prompt_ids          P P P
response_ids              a a e e a <eos>        (e = tool output)
response_mask             1 1 0 0 1 1
behavior_logprobs         . . 0 0 . .            log-prob under the sampling settings that drew the token
spans                    [0,3)v6 [3,6)v7         tile the whole response
"""

from enum import StrEnum
from typing import Annotated, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, model_validator

from buffer.arrays import BoolArray, Float32Array, Int32Array

SCHEMA: Final = 1
"""Number of this record layout. A reader refuses every other number."""

PolicyVersion = int
"""The learner's update clock when the weights were published; 0 = initial weights."""

IDENTIFIER_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$"

Identifier = Annotated[str, Field(pattern=IDENTIFIER_PATTERN)]
"""An opaque id; never interpreted, only compared."""

MAX_LOGPROB = 1e-3
"""Rounding may lift the log-prob of a certain token this far over 0; anything higher is not a log-prob."""

MASS_TOLERANCE = 1e-3
"""How far float32 rounding may take the sum of a shipped distribution from 1, and its drawn token's log-prob from the
behaviour log-prob, in nats."""

MAX_ITEMS = 1 << 16
"""Most trajectories of a group and spans of a response: what is accepted must stay within the limits of the codec."""

MAX_COLUMNS = 256
"""Most declared extra columns of a trajectory."""

MAX_REWARD = 1e18
"""Largest size of a reward: its square must still fit float32."""


class Record(BaseModel):
    """A frozen wire record. Unknown fields are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, strict=True
    )


class Split(StrEnum):
    TRAIN = "train"
    EVAL = "eval"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SamplingSettings(Record):
    """How the engine drew tokens. Ratios use the same settings on both sides."""

    temperature: Annotated[FiniteFloat, Field(gt=0)]
    """Logits are divided by this before the softmax."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)]
    """1 = off."""
    top_k: Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
    """0 = off."""
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)]
    """0 = off."""

    @property
    def truncates(self) -> bool:
        """Whether tokens were cut from the support, so that log-probs are renormalised over the kept ones."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class VersionSpan(Record):
    """Response tokens [start, end) drawn under one policy version; null = not drawn by this run's weights."""

    start: Annotated[StrictInt, Field(ge=0)]
    end: Annotated[StrictInt, Field(ge=1)]
    version: Annotated[StrictInt, Field(ge=0, lt=1 << 53)] | None


class Trajectory(Record):
    """One response, single- or multi-turn. T = number of response tokens."""

    trajectory_id: Identifier
    prompt_ids: Int32Array
    """[P] int32, at least one token."""
    response_ids: Int32Array
    """[T] int32, at least one token; includes the end token when it was sampled."""
    response_mask: BoolArray
    """[T] bool: 1 = drawn by the policy and trained on, 0 = tool output or other context."""
    behavior_logprobs: Float32Array
    """[T] float32, nats, as the engine computed them; 0 where the mask is 0."""
    spans: Annotated[tuple[VersionSpan, ...], Field(min_length=1, max_length=MAX_ITEMS, strict=False)]
    """Tile [0, T) in order."""
    sampling: SamplingSettings
    reward: Annotated[FiniteFloat, Field(ge=-MAX_REWARD, le=MAX_REWARD)]
    finish_reason: Annotated[FinishReason, Field(strict=False)]
    """Why the response ended; our learner trains on all alike, so leave out what was broken off."""
    token_rewards: Float32Array | None = None
    """[T] float32, optional per-token rewards, finite."""
    episode_id: Identifier | None = None
    """Trajectories of one episode count once in the baseline, by the mean of their rewards, which are usually one."""
    kept_token_ids: Int32Array | None = None
    """The ids that survived truncated sampling, token after token; required when `sampling` truncates. Without
    truncation: the ids, such as the most likely ones, that `distribution_logprobs` is about."""
    kept_token_counts: Int32Array | None = None
    """[T] int32: how many of `kept_token_ids` belong to each token; 0 where the mask is 0."""
    distribution_logprobs: Float32Array | None = None
    """Optional: the distribution that each token was drawn from, in nats under `sampling`, in line with
    `kept_token_ids`; without these [T * V], row after row over the whole vocabulary, 0 where the mask is 0."""
    columns: Annotated[dict[Identifier, Float32Array], Field(max_length=MAX_COLUMNS)] = {}
    """Extra columns, [T] float32 each, finite: stored and handed out; our learner reads none of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        length = len(self.response_ids)
        if not len(self.prompt_ids) or not length:
            raise ValueError("prompt_ids and response_ids need at least one token each")
        if min(self.prompt_ids.min(), self.response_ids.min()) < 0:
            raise ValueError("token ids must not be negative")
        per_token = {
            "response_mask": self.response_mask,
            "behavior_logprobs": self.behavior_logprobs,
            "token_rewards": self.token_rewards,
            "kept_token_counts": self.kept_token_counts,
            **self._named_columns(),
        }
        for name, array in per_token.items():
            if array is not None and len(array) != length:
                raise ValueError(f"{name} has {len(array)} entries for {length} response tokens")
        if not self.response_mask.any():
            raise ValueError("response_mask has no trained token")
        self._check_logprobs()
        self._check_spans(length)
        self.check_kept()
        self.check_distribution()
        return self

    def _named_columns(self) -> dict[str, Float32Array]:
        return {f"columns.{name}": column for name, column in self.columns.items()}

    def _check_logprobs(self) -> None:
        if not np.isfinite(self.behavior_logprobs).all():
            raise ValueError("behavior_logprobs must be finite: a token that was drawn has a probability above 0")
        if self.behavior_logprobs.max() > MAX_LOGPROB:
            raise ValueError("behavior_logprobs must not be above 0")
        if self.behavior_logprobs[~self.response_mask].any():
            raise ValueError("behavior_logprobs must be 0 where response_mask is 0")
        for name, values in {"token_rewards": self.token_rewards, **self._named_columns()}.items():
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"{name} must be finite")

    def _check_spans(self, length: int) -> None:
        position = 0
        for span in self.spans:
            if span.start != position or span.end <= span.start:
                raise ValueError(f"spans must tile the response in order: [{span.start}, {span.end}) after {position}")
            position = span.end
        if position != length:
            raise ValueError(f"spans end at {position}, the response has {length} tokens")

    def check_kept(self) -> None:
        """Check the ids that survived truncation. Raises ValueError."""
        ids, counts = self.kept_token_ids, self.kept_token_counts
        if (ids is None) != (counts is None):
            raise ValueError("kept_token_ids and kept_token_counts come together")
        if ids is None or counts is None:
            if self.sampling.truncates:
                raise ValueError(
                    "top_p, top_k or min_p cut the support: kept_token_ids and kept_token_counts are required"
                )
            return
        if counts.min() < 0 or int(counts.sum(dtype=np.int64)) != len(ids):
            raise ValueError("kept_token_counts must be non-negative and sum to the length of kept_token_ids")
        if (ids < 0).any():
            raise ValueError("kept_token_ids must not be negative")
        if counts[~self.response_mask].any():
            raise ValueError("kept_token_counts must be 0 where response_mask is 0")
        ends = np.cumsum(counts)
        for index in np.flatnonzero(self.response_mask):
            if self.response_ids[index] not in ids[ends[index] - counts[index] : ends[index]]:
                raise ValueError(f"response token {index} is not among its kept_token_ids")

    def check_distribution(self) -> None:
        """Check the shipped distribution. Raises ValueError."""
        logprobs, trained = self.distribution_logprobs, self.response_mask
        if logprobs is None:
            return
        ids, counts = self._support_of(logprobs)
        token = np.repeat(np.arange(len(counts)), counts)
        if not np.isfinite(logprobs).all() or logprobs.max() > MAX_LOGPROB:
            raise ValueError("distribution_logprobs must be finite and not above 0: leave out ids that cannot be drawn")
        if logprobs[~trained[token]].any():
            raise ValueError("distribution_logprobs must be 0 where response_mask is 0")
        if len(np.unique(token * (int(ids.max()) + 1) + ids)) != len(ids):
            raise ValueError("kept_token_ids name an id twice for one token: its distribution is ambiguous")
        mass = np.bincount(token, np.exp(logprobs.astype(np.float64)), len(counts))
        low = 1.0 if self.distribution_is_complete else 0.0
        for index in np.flatnonzero(trained & ((mass > 1 + MASS_TOLERANCE) | (mass < low - MASS_TOLERANCE))):
            raise ValueError(f"the distribution of response token {index} sums to {mass[index]:.6g}, not to 1")
        drawn = np.bincount(token, np.where(ids == self.response_ids[token], logprobs, 0.0), len(counts))
        for index in np.flatnonzero(trained & (np.abs(drawn - self.behavior_logprobs) > MASS_TOLERANCE)):
            raise ValueError(
                f"distribution_logprobs give response token {index} {drawn[index]:.6g} nats, "
                f"behavior_logprobs {self.behavior_logprobs[index]:.6g}"
            )

    def _support_of(self, logprobs: Float32Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the ids that `logprobs` are of, and how many each token has."""
        length = len(self.response_ids)
        if self.kept_token_ids is not None and self.kept_token_counts is not None:
            if len(logprobs) != len(self.kept_token_ids):
                raise ValueError(
                    f"distribution_logprobs has {len(logprobs)} entries for {len(self.kept_token_ids)} kept_token_ids"
                )
            return self.kept_token_ids.astype(np.int64), self.kept_token_counts.astype(np.int64)
        width, rest = divmod(len(logprobs), length)
        if not width or rest:
            raise ValueError(f"distribution_logprobs has {len(logprobs)} entries, no multiple of {length} tokens")
        if self.response_ids[self.response_mask].max() >= width:
            raise ValueError(f"distribution_logprobs has {width} ids a token, a response token lies beyond them")
        return np.tile(np.arange(width), length), np.full(length, width)

    @property
    def distribution_is_complete(self) -> bool:
        """Whether `distribution_logprobs`, if any, say all of the distribution, and not only its kept ids."""
        return self.sampling.truncates or self.kept_token_ids is None

    @property
    def oldest_version(self) -> PolicyVersion | None:
        """The oldest policy version of any span; None when no span is ours."""
        return min((span.version for span in self.spans if span.version is not None), default=None)

    @property
    def newest_version(self) -> PolicyVersion | None:
        """The newest policy version of any span; None when no span is ours."""
        return max((span.version for span in self.spans if span.version is not None), default=None)

    @property
    def is_foreign(self) -> bool:
        """Whether any span was not drawn by this run's weights."""
        return any(span.version is None for span in self.spans)


class Group(Record):
    """Trajectories of one prompt: the unit that is stored, sampled, aged and evicted."""

    run_id: Identifier
    group_id: Identifier
    prompt_id: Identifier
    split: Annotated[Split, Field(strict=False)]
    trajectories: Annotated[tuple[Trajectory, ...], Field(min_length=1, max_length=MAX_ITEMS, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [trajectory.trajectory_id for trajectory in self.trajectories]
        if len(set(ids)) != len(ids):
            raise ValueError("trajectory_id must be unique within a group")
        return self

    @property
    def oldest_version(self) -> PolicyVersion | None:
        """The version that defines the age of the group; None when no span is ours."""
        return min(self._versions(), default=None)

    @property
    def newest_version(self) -> PolicyVersion | None:
        """The newest version of any span; it must not exceed the latest published one."""
        return max(self._versions(), default=None)

    def _versions(self) -> list[PolicyVersion]:
        spans = [span for trajectory in self.trajectories for span in trajectory.spans]
        return [span.version for span in spans if span.version is not None]

    @property
    def is_foreign(self) -> bool:
        """Whether any trajectory has tokens that this run's weights did not draw."""
        return any(trajectory.is_foreign for trajectory in self.trajectories)

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all trajectories, masked ones included."""
        return sum(len(trajectory.response_ids) for trajectory in self.trajectories)


class Part(Record):
    """One trajectory of a group that its agent finishes one response at a time."""

    run_id: Identifier
    group_id: Identifier
    prompt_id: Identifier
    split: Annotated[Split, Field(strict=False)]
    group_size: Annotated[StrictInt, Field(ge=1, le=MAX_ITEMS)]
    """Trajectories of the whole group. It and the fields above are the same in every part of a group."""
    trajectory: Trajectory


class InsertOutcome(StrEnum):
    """What became of a submitted group or part. Only `accepted` promises storage."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    STALE = "stale"
    FULL = "full"
    OVERSIZE = "oversize"
    INVALID = "invalid"
    PENDING = "pending"
    """Parts only: held until its group is complete, not yet promised."""
    GROUP_CLOSED = "group_closed"
    """Parts only: its group takes no more trajectories."""

    def __bool__(self) -> bool:
        raise TypeError("an InsertOutcome is not a truth value: compare it")


class InsertResult(Record):
    """The outcome of one group of a submission, in the order submitted."""

    group_id: str
    outcome: Annotated[InsertOutcome, Field(strict=False)]
    reason: str = ""
    """One sentence for every outcome but `accepted`: what is wrong and what to do."""


class PartResult(InsertResult):
    """The outcome of one part; that of the part which completes a group is the outcome of the group."""

    trajectory_id: str


class SampleInfo(Record):
    """What the table knew about a group when it was drawn."""

    probability: float
    """Chance of this group in one draw: its weight / total eligible weight; 1 without a lot."""
    num_candidates: int
    """Groups that the lot could choose from, 1 without one: 1 / (num_candidates * probability) corrects for it."""
    times_sampled: int
    """How often it has been handed out, this draw included."""
    age_updates: int | None
    """learner version - oldest span version, in updates; None for data not drawn by our weights."""


class Sample(Record):
    """One drawn group."""

    group: Group
    info: SampleInfo


class LimiterState(StrEnum):
    """Who may move."""

    FLOWING = "flowing"
    LEARNER_WAITS = "learner_waits"
    ACTORS_WAIT = "actors_wait"


Role = Literal["submit", "act", "learn", "read", "admin"]
