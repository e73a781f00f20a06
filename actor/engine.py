"""The engine protocol: token ids in; token ids, behaviour log-probs and version spans out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from buffer.types import FinishReason, PolicyVersion, SamplingSettings, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One response to draw."""

    prompt_ids: npt.NDArray[np.int32]  # [P]
    sampling: SamplingSettings
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One drawn response. T = its tokens, end token included."""

    response_ids: npt.NDArray[np.int32]  # [T]
    behavior_logprobs: npt.NDArray[np.float32]  # [T] nats, under the sampling settings, renormalised when truncated
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    kept_token_ids: npt.NDArray[np.int32] | None  # set when the sampling settings truncate
    kept_token_counts: npt.NDArray[np.int32] | None  # [T]
    distribution_logprobs: npt.NDArray[np.float32] | None = None  # [T * V], or in line with kept_token_ids; if asked


class Engine(Protocol):
    """Something that samples from the policy. One thread generates, or several where actor.batches_in_flight says so;
    another one brings new versions meanwhile.

    How they come in is another protocol: actor.receiver.
    """

    @property
    def version(self) -> PolicyVersion:
        """The version of the weights in use; -1 before the first load."""
        ...

    @property
    def max_tokens(self) -> int:
        """Prompt and response together, at most."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Draw all requests in one batch, in the order given."""
        ...

    def abort(self) -> None:
        """End every request of `generate` after the running decode step, with the tokens drawn so far.

        Any thread may call it. Without a running `generate` nothing happens.
        """
        ...

    def score(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the log-probs [N - 1] of token_ids[1:] at temperature 1: what the canary compares."""
        ...
