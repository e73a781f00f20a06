"""From the logits of some trained tokens to their log-probs and statistics, and from gradients of these back to logits.

Legend: n trained tokens of a micro-batch, row after row; c of them in a chunk; b rows; V vocabulary; K listed ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from learner.collate import Batch, Distribution, Kept
from learner.divergence import kl_divergence, kl_lower_bound, total_variation
from learner.tokens import DIVERGENCES, Column

LOGPROBS = "logprobs"
"""Log pi of the drawn token under the stored sampling settings: always computed."""
CHOSEN_LOGIT = "chosen_logit"
"""The model's own logit of the drawn token, of which `first_logit` is the first of each row."""
DIFFERENTIABLE = (LOGPROBS, Column.UNIT_LOGPROBS.value, Column.LOGSUMEXP.value, CHOSEN_LOGIT)
"""Scores that gradients flow through."""

_OF_UNIT_TEMPERATURE = frozenset({Column.UNIT_LOGPROBS, Column.LOGSUMEXP})
_OF_WHOLE_DISTRIBUTIONS = frozenset({Column.ENTROPY, Column.OTHER_SQUARED_PROBS}) | DIVERGENCES


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Token ids that belong to trained tokens, a number of them for each."""

    token_ids: Tensor  # [K] int64, token after token
    counts: Tensor  # [n] int64, on the CPU
    logprobs: Tensor | None = None  # [K] float32

    def part(self, first: int, last: int) -> Self:
        """Those of the trained tokens from `first` to before `last`."""
        start, length = int(self.counts[:first].sum()), int(self.counts[first:last].sum())
        return replace(
            self,
            token_ids=self.token_ids[start : start + length],
            counts=self.counts[first:last],
            logprobs=None if self.logprobs is None else self.logprobs[start : start + length],
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """Return (token [K], id [K]): where they stand in [n, V]."""
        owners = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        return owners.to(self.token_ids.device), self.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The trained tokens of a micro-batch and how they were drawn."""

    token_ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64: which hidden states predict them
    temperature: Tensor | None  # [n] float32; None when all are 1
    truncated: Tensor | None  # [n] bool: drawn from the ids of `kept` alone; None when none was
    kept: Listed | None
    shipped: Listed | None  # what they were drawn from; None when that was not asked for

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def plain(self) -> bool:
        """Whether the sampling settings leave the model's distribution as it is."""
        return self.temperature is None and self.truncated is None

    def part(self, first: int, last: int) -> Self:
        """The tokens from `first` to before `last`."""
        return replace(
            self,
            token_ids=self.token_ids[first:last],
            positions=self.positions[first:last],
            temperature=None if self.temperature is None else self.temperature[first:last],
            truncated=None if self.truncated is None else self.truncated[first:last],
            kept=None if self.kept is None else self.kept.part(first, last),
            shipped=None if self.shipped is None else self.shipped.part(first, last),
        )

    def at_unit_temperature(self) -> Self:
        """The same tokens as if nothing had been scaled or cut: what a reference is asked for."""
        return replace(self, temperature=None, truncated=None, kept=None, shipped=None)


def targets(batch: Batch, rows: Tensor, *, with_distributions: bool, device: torch.device) -> Targets:
    """Return the trained tokens of `rows` [b], laid end to end as `packing.join` does."""
    mask = batch.mask[rows]
    row, time = mask.nonzero(as_tuple=True)  # [n] each
    lengths = batch.sequence_lengths[rows]
    place = batch.prompt_lengths[rows][row] + time
    temperature = batch.temperature[rows]
    kept = [batch.kept[index] for index in rows.tolist()]
    truncates = torch.tensor([entry is not None for entry in kept])
    return Targets(
        token_ids=batch.token_ids[rows[row], place].to(device),
        positions=((lengths.cumsum(0) - lengths)[row] + place - 1).to(device),  # the state before a token predicts it
        temperature=None if bool((temperature == 1).all()) else temperature[row].to(device),
        truncated=truncates[row].to(device) if bool(truncates.any()) else None,
        kept=_listed(kept, mask, device) if bool(truncates.any()) else None,
        shipped=_shipped([batch.distributions[i] for i in rows.tolist()], mask, device) if with_distributions else None,
    )


@torch.no_grad()
def score(logits: Tensor, drawn: Targets, wanted: frozenset[Column]) -> dict[str, Tensor]:
    """Compute from logits [c, V] float32, which are spoilt, the log-probs and the `wanted` columns: [c] each.

    What is not the policy's own business (reference and proximal columns) is left out.
    """
    scores: dict[str, Tensor] = {}
    chosen = _chosen(logits, drawn.token_ids)
    if Column.FIRST_LOGIT in wanted:
        scores[CHOSEN_LOGIT] = chosen
    unit = logits.logsumexp(-1) if wanted & _OF_UNIT_TEMPERATURE or drawn.plain else None
    scaled, logsumexp = logits, unit
    if not drawn.plain:
        scaled = _as_sampled(logits, drawn)
        logsumexp = scaled.logsumexp(-1)
    assert logsumexp is not None
    scores[LOGPROBS] = (chosen if drawn.temperature is None else chosen / drawn.temperature) - logsumexp
    if unit is not None and Column.UNIT_LOGPROBS in wanted:
        scores[Column.UNIT_LOGPROBS] = chosen - unit
    if unit is not None and Column.LOGSUMEXP in wanted:
        scores[Column.LOGSUMEXP] = unit
    if wanted & _OF_WHOLE_DISTRIBUTIONS:
        logprobs = scaled.sub_(logsumexp[:, None])
        if wanted & DIVERGENCES:
            scores |= _divergences(_behavior(logprobs, drawn), logprobs, wanted)
        if Column.OTHER_SQUARED_PROBS in wanted:
            scores[Column.OTHER_SQUARED_PROBS] = other_squared_probs(logprobs, drawn.token_ids)
        if Column.ENTROPY in wanted:
            scores[Column.ENTROPY] = torch.special.entr(logprobs.exp_()).sum(-1)
    return scores


@torch.no_grad()
def logits_gradient(logits: Tensor, drawn: Targets, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return d sum(gradient * score) / d logits [c, V], from logits that are spoilt and the gradients [c] of scores."""
    none = logits.new_zeros(len(logits))
    of_logprobs = gradients.get(LOGPROBS, none)
    of_unit = gradients.get(Column.UNIT_LOGPROBS, none)
    of_logsumexp = gradients.get(Column.LOGSUMEXP, none)
    of_chosen = of_unit + gradients.get(CHOSEN_LOGIT, none)
    if drawn.plain:
        gradient = logits.softmax(-1).mul_((of_logsumexp - of_unit - of_logprobs)[:, None])
        return gradient.scatter_add_(-1, drawn.token_ids[:, None], (of_chosen + of_logprobs)[:, None])
    if drawn.temperature is not None:
        of_logprobs = of_logprobs / drawn.temperature
    unit = None
    if gradients.keys() & _OF_UNIT_TEMPERATURE:
        unit = logits.softmax(-1).mul_((of_logsumexp - of_unit)[:, None])
    gradient = _as_sampled(logits, drawn).softmax(-1).mul_(-of_logprobs[:, None])
    if unit is not None:
        gradient += unit
    return gradient.scatter_add_(-1, drawn.token_ids[:, None], (of_chosen + of_logprobs)[:, None])


def available_divergences(distributions: Sequence[Distribution | None]) -> frozenset[Column]:
    """Return the divergences that a batch with these distributions can be asked for."""
    if any(entry is None for entry in distributions):
        return frozenset()
    if all(entry is not None and entry.complete for entry in distributions):
        return DIVERGENCES
    return frozenset({Column.KL_LOWER_BOUND})


def other_squared_probs(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """Return the sum [n] of pi^2 over all tokens but the drawn one, from log pi [n, V], with nothing to cancel."""
    return (2 * logprobs).exp_().scatter_(-1, token_ids[:, None], 0.0).sum(-1)


def _chosen(values: Tensor, token_ids: Tensor) -> Tensor:
    return values.gather(-1, token_ids[:, None]).squeeze(-1)


def _as_sampled(logits: Tensor, drawn: Targets) -> Tensor:
    """The logits that tokens were drawn by, in place."""
    if drawn.temperature is not None:
        logits /= drawn.temperature[:, None]
    if drawn.truncated is not None and drawn.kept is not None:
        support = (~drawn.truncated)[:, None].repeat(1, logits.shape[1])
        support[drawn.kept.places()] = True
        logits.masked_fill_(~support, -torch.inf)
    return logits


def _divergences(behavior: Tensor, policy: Tensor, wanted: frozenset[Column]) -> dict[str, Tensor]:
    columns: dict[str, Tensor] = {}
    if Column.EXACT_KL in wanted:
        columns[Column.EXACT_KL] = kl_divergence(behavior, policy)
    if Column.EXACT_TV in wanted:
        columns[Column.EXACT_TV] = total_variation(behavior, policy)
    if Column.KL_LOWER_BOUND in wanted:
        columns[Column.KL_LOWER_BOUND] = kl_lower_bound(behavior, policy)
    return columns


def _behavior(policy: Tensor, drawn: Targets) -> Tensor:
    """The shipped log-probs of each token's distribution, as [c, V]; -inf for ids that were not shipped."""
    assert drawn.shipped is not None, "divergences were asked of a batch without distributions"
    assert drawn.shipped.logprobs is not None
    behavior = torch.full_like(policy, -torch.inf)
    behavior[drawn.shipped.places()] = drawn.shipped.logprobs
    return behavior


def _listed(entries: Sequence[Kept | None], mask: Tensor, device: torch.device) -> Listed:
    """Join the kept ids of each row; counts are 0 behind the mask and where nothing was cut."""
    counts = [
        torch.zeros(int(of_row.sum()), dtype=torch.int64)
        if entry is None
        else entry.counts[of_row[: len(entry.counts)]]
        for entry, of_row in zip(entries, mask, strict=True)
    ]
    token_ids = torch.cat([entry.token_ids for entry in entries if entry is not None])
    return Listed(token_ids=token_ids.to(device), counts=torch.cat(counts))


def _shipped(entries: Sequence[Distribution | None], mask: Tensor, device: torch.device) -> Listed:
    token_ids, counts, logprobs = [], [], []
    for entry, of_row in zip(entries, mask, strict=True):
        assert entry is not None, "divergences were asked of a batch without distributions"
        if entry.kept is None:
            of_tokens = entry.logprobs[of_row[: len(entry.logprobs)]]  # [n of the row, ids]
            counts.append(torch.full((len(of_tokens),), of_tokens.shape[1]))
            token_ids.append(torch.arange(of_tokens.shape[1]).repeat(len(of_tokens)))
            logprobs.append(of_tokens.flatten())
        else:
            counts.append(entry.kept.counts[of_row[: len(entry.kept.counts)]])
            token_ids.append(entry.kept.token_ids)
            logprobs.append(entry.logprobs)
    return Listed(
        token_ids=torch.cat(token_ids).to(device), counts=torch.cat(counts), logprobs=torch.cat(logprobs).to(device)
    )
