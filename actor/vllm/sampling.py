"""What vLLM can be asked to draw, and which token ids it kept: the same in this process and over HTTP."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actor.engine import GenerationRequest
from buffer.errors import InvalidRequest, InvalidSettings
from buffer.types import FinishReason, SamplingSettings

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this one: the log-probs would belong to other settings."""
MAX_TOP_K = 64
"""Kept ids are read from each token's top log-probs, so their number bounds what is shipped per token."""
TIES = 8
"""Log-probs asked beyond top_k: tokens tied at the threshold are kept as well."""
MAX_LOGPROBS = MAX_TOP_K + TIES
"""What vLLM must be started with as --max-logprobs."""
CUT_NATS = -9000.0
"""Log-probs below are those of tokens that truncated sampling cut: -inf, which vLLM's server writes as -9999."""


def check_sampling(sampling: SamplingSettings, *, setting: str = "actor.sampling") -> None:
    """Raise InvalidSettings for sampling settings whose behaviour log-probs vLLM cannot report in full."""
    if sampling.temperature < MIN_TEMPERATURE:
        raise InvalidSettings(
            f"{setting}.temperature={sampling.temperature} is below {MIN_TEMPERATURE}: vLLM would silently use"
            f" {MIN_TEMPERATURE}",
            hint="for the most likely token set top_k = 1",
        )
    if sampling.truncates and not 1 <= sampling.top_k <= MAX_TOP_K:
        raise InvalidSettings(
            f"{setting}: top_p={sampling.top_p}, top_k={sampling.top_k}, min_p={sampling.min_p}: vLLM reports which"
            f" tokens truncated sampling kept only among the {MAX_TOP_K} most likely ones",
            hint=f"set top_k between 1 and {MAX_TOP_K} as well, or top_p = 1, top_k = 0 and min_p = 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The ids that truncated sampling kept for one response."""

    ids: npt.NDArray[np.int32] | None  # ragged, token after token; None without truncation
    counts: npt.NDArray[np.int32] | None  # [T]
    are_all: bool = True
    """False: more ids tie with the last of top_k than vLLM was asked for, and some are missing."""

    def finish_reason(self, said: str) -> FinishReason:
        """Return vLLM's, or abort, by which a response whose ids are not all there is left out with its group."""
        return FinishReason(said) if self.are_all else FinishReason.ABORT


class Limits:
    """What the served model takes, checked before vLLM, without a tokenizer to ask, would die of it in mid-step."""

    def __init__(self, *, vocab_size: int, max_model_tokens: int, end_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self.max_model_tokens = max_model_tokens
        self._end_ids = end_ids
        self.incomplete_total = 0
        """Responses of which not all kept ids were reported."""

    def check(self, prompt_ids: npt.NDArray[np.int32], max_new_tokens: int) -> None:
        """Raise InvalidRequest for ids outside the vocabulary, and for more tokens than vLLM was started for."""
        if not len(prompt_ids) or prompt_ids.min() < 0 or prompt_ids.max() >= self._vocab_size:
            raise InvalidRequest(
                f"a prompt needs token ids from 0 to {self._vocab_size - 1}, not {prompt_ids.tolist()}"
            )
        if len(prompt_ids) + max_new_tokens > self.max_model_tokens:
            raise InvalidRequest(
                f"{len(prompt_ids)} prompt tokens and max_new_tokens={max_new_tokens} exceed the"
                f" {self.max_model_tokens} tokens this engine was started for",
                hint="lower actor.max_new_tokens, or raise actor.vllm.max_model_tokens up to the model's limit",
            )

    def sampling_params(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the arguments of vLLM's SamplingParams. Raises InvalidRequest, InvalidSettings."""
        sampling = request.sampling
        check_sampling(sampling)
        self.check(request.prompt_ids, request.max_new_tokens)
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": list(self._end_ids),
            "logprobs": self._num_reported(sampling),
            "detokenize": False,
        }

    def kept(self, sampling: SamplingSettings, reported: Iterable[Sequence[tuple[int, float]]]) -> Kept:
        """Return the ids that truncated sampling kept, of the likeliest (id, log-prob) pairs of each drawn token."""
        if not sampling.truncates:
            return Kept(ids=None, counts=None)
        ids: list[int] = []
        counts: list[int] = []
        num_reported = self._num_reported(sampling)
        for pairs in reported:
            kept = {token for token, logprob in pairs if logprob > CUT_NATS}
            if len(kept) >= num_reported < self._vocab_size:
                self._note_incomplete(sampling)
                return Kept(ids=None, counts=None, are_all=False)
            ids.extend(sorted(kept))
            counts.append(len(kept))
        return Kept(ids=np.array(ids, np.int32), counts=np.array(counts, np.int32))

    def _note_incomplete(self, sampling: SamplingSettings) -> None:
        self.incomplete_total += 1
        if self.incomplete_total.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: it may happen in every batch
            log.warning(
                "%d responses so far are left out with their groups: %d ids or more tie with the last of top_k=%d, and"
                " the kept ids are incomplete; another top_k, or none, may help",
                self.incomplete_total,
                TIES,
                sampling.top_k,
            )

    def _num_reported(self, sampling: SamplingSettings) -> int:
        """How many of the most likely tokens come with each drawn one, which always comes."""
        return min(sampling.top_k + TIES, self._vocab_size) if sampling.truncates else 0
