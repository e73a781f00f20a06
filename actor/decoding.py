"""The state of one batch between decode steps.

Legend: R requests, B rows still in the batch (finished ones are compacted away), N tokens of context, T new tokens.

context, left-padded:      . . P P a a      (. = PAD)
                           P P P P a a
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from actor.engine import Completion, GenerationRequest
from actor.sampling import RowSettings
from buffer.types import FinishReason, PolicyVersion, VersionSpan

PAD = -1
"""Marks padding in a context; no token id, so that equal rows are equal contexts."""


class Decoding:
    """Responses in the making. All rows are at the same response position, so one list of spans serves them all."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        end_ids: Sequence[int],
        vocab_size: int,
        ship_distributions: bool,
    ) -> None:
        self._requests = requests
        self._end_ids = torch.tensor(end_ids)
        self._limits = torch.tensor([request.max_new_tokens for request in requests])  # [R]
        longest = int(self._limits.max())
        self._ids = torch.zeros(len(requests), longest, dtype=torch.long)  # [R, T]
        self._logprobs = torch.zeros(len(requests), longest)  # [R, T]
        self._lengths = torch.zeros(len(requests), dtype=torch.long)  # [R] 0 = unfinished
        self._aborted = torch.zeros(len(requests), dtype=torch.bool)  # [R]
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # per step: request [K], step [K], kept id [K]
        self._distributions: list[tuple[Tensor, Tensor]] | None = (
            [] if ship_distributions else None
        )  # per step: request [B], log-probs [B, V]
        self._spans: list[tuple[int, PolicyVersion]] = []  # first step, version
        self._step = 0
        self._rows = torch.arange(len(requests))  # [B] row -> request
        self.settings = RowSettings.of([request.sampling for request in requests], vocab_size=vocab_size)
        self.context = _left_padded(requests)  # [B, N]
        self._padding = (self.context == PAD).sum(1)  # [B]
        self.cache: DynamicCache | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests whose response has not ended."""
        return int((self._lengths == 0).sum())

    @property
    def version(self) -> PolicyVersion | None:
        """The version whose KV the cache holds; None before the first prefill."""
        return self._spans[-1][1] if self._spans else None

    @property
    def attention_mask(self) -> Tensor | None:
        """[B, N] int64; None without padding, which is faster."""
        return (self.context != PAD).long() if self._padding.any() else None

    @property
    def last_positions(self) -> Tensor:
        """[B, 1] int64: the position of the last token of each row."""
        return (self.context.shape[1] - 1 - self._padding)[:, None]

    def open_span(self, version: PolicyVersion) -> None:
        """Draw under `version` from here on."""
        self._spans.append((self._step, version))

    def append(self, ids: Tensor, drawn_logprobs: Tensor, logprobs: Tensor) -> None:
        """Add a token to every row: ids [B], their log-probs [B], and all log-probs [B, V] (-inf = cut)."""
        self._ids[self._rows, self._step] = ids
        self._logprobs[self._rows, self._step] = drawn_logprobs
        if self.settings.any_truncates:
            kept = ((logprobs > -torch.inf) & self.settings.truncates).nonzero()  # [K, 2] row, id
            self._kept.append((self._rows[kept[:, 0]], torch.full((len(kept),), self._step), kept[:, 1]))
        if self._distributions is not None:
            self._distributions.append((self._rows, logprobs))
        self._step += 1
        ended = torch.isin(ids, self._end_ids) | (self._limits[self._rows] == self._step)
        ended &= self._lengths[self._rows] == 0
        self._lengths[self._rows[ended]] = self._step
        self.context = torch.cat([self.context, ids[:, None]], 1)
        self._compact()

    def abort(self) -> None:
        """End the responses that are not finished after the tokens drawn so far, one at least."""
        self._aborted = self._lengths == 0
        self._lengths[self._aborted] = self._step

    def completions(self) -> list[Completion]:
        """Return the finished responses in the order of the requests."""
        ids, logprobs = self._ids.numpy().astype(np.int32), self._logprobs.numpy()
        kept = self._kept_by_request()
        distributions = self._distributions_by_request()
        completions = []
        for index, (request, length) in enumerate(zip(self._requests, self._lengths.tolist(), strict=True)):
            kept_ids, kept_counts = kept[index] if request.sampling.truncates else (None, None)
            ended = FinishReason.STOP if int(ids[index, length - 1]) in self._end_ids else FinishReason.LENGTH
            completions.append(
                Completion(
                    response_ids=ids[index, :length],
                    behavior_logprobs=logprobs[index, :length],
                    spans=self._spans_until(length),
                    finish_reason=FinishReason.ABORT if self._aborted[index] else ended,
                    kept_token_ids=kept_ids,
                    kept_token_counts=kept_counts,
                    distribution_logprobs=distributions[index] if distributions else None,
                )
            )
        return completions

    def _compact(self) -> None:
        """Drop finished rows once they are half of the batch: until then their steps cost less than the copy."""
        alive = (self._lengths[self._rows] == 0).nonzero().squeeze(1)  # [b]
        if not 0 < len(alive) <= len(self._rows) // 2:
            return
        self._rows = self._rows[alive]
        self.settings = self.settings.rows(alive)
        self.context = self.context[alive]
        self._padding = self._padding[alive]
        assert self.cache is not None
        self.cache.batch_select_indices(alive)

    def _spans_until(self, length: int) -> tuple[VersionSpan, ...]:
        starts = [start for start, _ in self._spans if start < length]
        ends = [*starts[1:], length]
        return tuple(
            VersionSpan(start=start, end=end, version=version)
            for (start, version), end in zip(self._spans[: len(starts)], ends, strict=True)
        )

    def _kept_by_request(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return kept ids [K] and counts [length] int32 of every request, token after token."""
        if not self._kept:
            return []
        request, step, ids = (torch.cat(column) for column in zip(*self._kept, strict=True))
        within = step < self._lengths[request]  # a finished row goes on drawing until it is compacted away
        request, step, ids = request[within], step[within], ids[within]
        counts = torch.zeros_like(self._ids).index_put_((request, step), torch.ones_like(ids), accumulate=True)
        by_request = ids[request.argsort(stable=True)].numpy().astype(np.int32)
        parts = np.split(by_request, counts.sum(1).cumsum(0)[:-1].numpy())
        return [
            (part, row[:length].astype(np.int32))
            for part, row, length in zip(parts, counts.numpy(), self._lengths.tolist(), strict=True)
        ]

    def _distributions_by_request(self) -> list[np.ndarray]:
        """Return every request's log-probs float32, token after token: [length * V], or [K] in line with kept ids."""
        if not self._distributions:
            return []
        steps: list[list[Tensor]] = [[] for _ in self._requests]
        for rows, logprobs in self._distributions:
            for request, of_row in zip(rows.tolist(), logprobs, strict=True):
                steps[request].append(of_row)
        by_request = [torch.stack(rows[:length]) for rows, length in zip(steps, self._lengths.tolist(), strict=True)]
        return [logprobs[logprobs > -torch.inf].numpy() for logprobs in by_request]


def _left_padded(requests: Sequence[GenerationRequest]) -> Tensor:
    longest = max(len(request.prompt_ids) for request in requests)
    context = torch.full((len(requests), longest), PAD)
    for row, request in enumerate(requests):
        context[row, longest - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.astype(np.int64))
    return context
