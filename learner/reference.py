"""The reference model: a frozen copy of the policy whose log-probs are computed once per trajectory and cached.

Legend: B trajectories, T response positions.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.collate import Batch
from learner.policy import Policy
from learner.tokens import Column

REFERENCE_COLUMNS = frozenset({Column.REFERENCE_LOGPROBS, Column.REFERENCE_FIRST_LOGIT})
"""What a recipe asks for when it needs a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    logprobs: Tensor  # [trained tokens] float32, temperature 1
    first_logit: Tensor  # [] float32, raw

    @property
    def nbytes(self) -> int:
        return self.logprobs.nbytes + self.first_logit.nbytes


class Reference:
    """A frozen policy and the terms it gave, least recently used dropped first."""

    def __init__(self, policy: Policy, *, reference_id: str, cache_bytes: int) -> None:
        self.policy = policy.frozen_copy()
        self.reference_id = reference_id
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[tuple[str, str], _Terms] = OrderedDict()
        self._cached_bytes = 0
        self._counts: Counter[str] = Counter(hits=0, misses=0, evictions=0)

    def metrics(self) -> dict[str, float]:
        """Return how the cache did since the learner started, by trajectories, and what it holds now."""
        counts = {f"reference/cache_{name}_total": float(count) for name, count in self._counts.items()}
        return {**counts, "reference/cache_bytes": float(self._cached_bytes)}

    def reset(self, policy: Policy, *, reference_id: str) -> None:
        """Become a copy of `policy`."""
        self.restore(policy.weights(), reference_id=reference_id)

    def restore(self, weights: Mapping[str, Tensor], *, reference_id: str) -> None:
        """Become the reference with these weights; every term of the one before is void."""
        self.policy.load_weights(weights)
        self.reference_id = reference_id
        self._cached.clear()
        self._cached_bytes = 0

    def columns(self, batch: Batch) -> dict[Column, Tensor]:
        """Return reference_logprobs [B, T], 0 behind the mask, and reference_first_logit [B], both on the CPU."""
        terms = {row: self._cached[key] for row, key in enumerate(batch.keys) if key in self._cached}
        missing = [row for row in range(len(batch.keys)) if row not in terms]
        self._counts.update(hits=len(terms), misses=len(missing))
        terms |= self._compute(batch, missing)
        logprobs = torch.zeros(batch.mask.shape)
        for row, term in terms.items():
            logprobs[row, batch.mask[row]] = term.logprobs
        first_logit = torch.stack([terms[row].first_logit for row in range(len(batch.keys))])
        self._remember(batch, terms)
        return {Column.REFERENCE_LOGPROBS: logprobs, Column.REFERENCE_FIRST_LOGIT: first_logit}

    def _compute(self, batch: Batch, missing: list[int]) -> dict[int, _Terms]:
        terms = {}
        for rows in self.policy.micro_batches(batch, missing):
            of_tokens, first_logits = self.policy.unit_scores(batch, rows)
            logprobs = torch.split(of_tokens.cpu(), batch.mask[rows].sum(-1).tolist())
            for row, of_row, first in zip(rows.tolist(), logprobs, first_logits.cpu(), strict=True):
                terms[row] = _Terms(logprobs=of_row.clone(), first_logit=first)  # a view would hold the whole batch
        return terms

    def _remember(self, batch: Batch, terms: dict[int, _Terms]) -> None:
        for row, key in enumerate(batch.keys):
            if key not in self._cached:
                self._cached_bytes += terms[row].nbytes
            self._cached[key] = terms[row]
            self._cached.move_to_end(key)
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._cached.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
            self._counts["evictions"] += 1
