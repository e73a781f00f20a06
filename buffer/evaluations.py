"""Evaluations of published versions: whose turn it is, and what came out."""

from collections.abc import Mapping
from typing import Annotated, Protocol

from pydantic import Field, FiniteFloat, StrictInt

from buffer.types import Identifier, PolicyVersion, Record, SamplingSettings

Version = Annotated[PolicyVersion, Field(ge=0, lt=1 << 53)]
MAX_SAMPLES = 1 << 16
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class EvaluationClaim(Record):
    """An actor that holds a version offers to evaluate it: the body of POST /v1/evaluations/claims."""

    actor_id: Identifier
    version: Version
    """The verified version that the actor holds, and will hold until it is done."""
    every_updates: Annotated[StrictInt, Field(ge=1, lt=1 << 53)]
    """One version is evaluated out of each [n * every_updates, (n + 1) * every_updates)."""
    lease_s: Annotated[FiniteFloat, Field(gt=0, le=86_400)]
    """Seconds after which a claim without a result counts no more."""


class ClaimAnswer(Record):
    """Whether the claimant evaluates the version."""

    granted: bool
    reason: str
    """Why not; empty when it does."""
    ask_again_s: FiniteFloat | None = None
    """Seconds after which the interval may be free again; null = never."""


class Evaluation(Record):
    """What one actor measured of one version on held-out prompts: the body of PUT /v1/evaluations/{version}."""

    actor_id: Identifier
    version: Version
    oldest_version: Version
    """Oldest version that drew a token of it. It is `version`, as is `newest_version`, or something is wrong."""
    newest_version: Version
    num_prompts: Annotated[StrictInt, Field(ge=1)]
    samples_per_prompt: Annotated[StrictInt, Field(ge=1, le=MAX_SAMPLES)]
    sampling: SamplingSettings
    pass_at: Annotated[dict[str, Share], Field(min_length=1, max_length=32)]
    """k as text -> unbiased estimate of the probability that one of k samples is solved, mean over prompts
    (arXiv 2107.03374). "1" is always there."""
    pass_1_standard_error: Annotated[FiniteFloat, Field(ge=0)]
    """Standard error of pass@1 over the prompts, as if they were drawn at random."""
    reward_mean: FiniteFloat
    response_tokens_mean: Annotated[FiniteFloat, Field(ge=0)]
    finished_s: FiniteFloat
    """Unix time at its end, seconds."""
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    """How long it took."""


class RunningEvaluation(Record):
    """A claim without a result."""

    actor_id: Identifier
    version: Version
    age_s: float


class EvaluationBoard(Record):
    """The answer of GET /v1/evaluations."""

    results: list[Evaluation]
    """The newest, oldest first."""
    best_version: PolicyVersion | None
    """The version with the highest pass@1, the earliest of equals; its weights are kept. null before the first."""
    running: list[RunningEvaluation]


class Evaluations(Protocol):
    """Where actors learn whose turn it is, and everybody what came out."""

    def claim(self, claim: EvaluationClaim) -> ClaimAnswer:
        """Ask to evaluate a version; at most one actor at a time is granted one of an interval."""
        ...

    def record(self, evaluation: Evaluation) -> None:
        """Hand in a result. Raises Conflict when the claim was given to another one meanwhile, or never granted."""
        ...

    def read(self) -> EvaluationBoard:
        """Return what is known."""
        ...


def best_version(results: Mapping[PolicyVersion, Evaluation]) -> PolicyVersion | None:
    """Return the version with the highest pass@1, the earliest of equals; None without results."""
    return min(results, key=lambda version: (-results[version].pass_at["1"], version), default=None)
