"""From the logits of one micro-batch to the log-probs and statistics of its trained tokens.

Legend: n trained tokens, row after row; b rows of the micro-batch; S sequence positions; V vocabulary. Nothing of size
V outlives the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.collate import Batch, Distribution, Kept
from learner.divergence import kl_divergence, kl_lower_bound, total_variation
from learner.tokens import DIVERGENCES, Column


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The trained tokens of some rows, and the logits that they were drawn from."""

    logits: Tensor  # [n, V] float32, raw
    token_ids: Tensor  # [n] int64
    starts: Tensor  # [b] int64: where in n each row begins
    temperature: Tensor | None  # [n] float32; None when all are 1
    support: Tensor | None  # [n, V] bool: ids that truncated sampling kept; None when nothing was truncated
    mask: Tensor  # [b, T] bool: which tokens of each row the n are
    distributions: tuple[Distribution | None, ...]  # b entries: what the tokens were drawn from


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the policy says about trained tokens: [n] for each token, [b] for `first_logit`."""

    logprobs: Tensor
    """Under the stored sampling settings."""
    columns: dict[Column, Tensor]


def draw(model: PreTrainedModel, batch: Batch, rows: Tensor) -> Drawn:
    """Run the model over `rows` [b] of the batch and keep the logits that predict trained tokens."""
    device = model.device
    mask = batch.mask[rows]
    row, time = mask.nonzero(as_tuple=True)  # [n] each
    position = batch.prompt_lengths[rows][row] + time - 1  # the logits that predict a token stand one before it
    width = int(batch.sequence_lengths[rows].max())
    token_ids = batch.token_ids[rows, :width]
    first = int(position.min())
    # no attention mask: padding is on the right, so that no trained token can see it
    output = model(input_ids=token_ids.to(device), use_cache=False, logits_to_keep=width - first)
    lengths = mask.sum(-1)
    temperature = batch.temperature[rows]
    return Drawn(
        logits=output.logits[row.to(device), (position - first).to(device)].float(),
        token_ids=token_ids[row, position + 1].to(device),
        starts=(lengths.cumsum(0) - lengths).to(device),
        temperature=None if bool((temperature == 1).all()) else temperature[row].to(device),
        support=_support([batch.kept[index] for index in rows.tolist()], mask, output.logits.shape[-1], device),
        mask=mask,
        distributions=tuple(batch.distributions[index] for index in rows.tolist()),
    )


def score(drawn: Drawn, wanted: frozenset[Column]) -> Scores:
    """Compute the log-probs and the `wanted` columns of the policy; those of the reference are not its business."""
    scaled = drawn.logits if drawn.temperature is None else drawn.logits / drawn.temperature[:, None]
    if drawn.support is not None:
        scaled = scaled.masked_fill(~drawn.support, -torch.inf)
    logsumexp = scaled.logsumexp(-1)
    logprobs = _chosen(scaled, drawn.token_ids) - logsumexp
    columns: dict[Column, Tensor] = {}
    if Column.UNIT_LOGPROBS in wanted:
        columns[Column.UNIT_LOGPROBS] = logprobs if scaled is drawn.logits else unit_logprobs(drawn)
    if Column.FIRST_LOGIT in wanted:
        columns[Column.FIRST_LOGIT] = first_logits(drawn)
    if Column.PROXIMAL_LOGPROBS in wanted:
        columns[Column.PROXIMAL_LOGPROBS] = logprobs.detach()  # one optimiser step a batch: the policy before it
    with torch.no_grad():
        if Column.ENTROPY in wanted:
            columns[Column.ENTROPY] = torch.special.entr((scaled - logsumexp[:, None]).exp()).sum(-1)
        if Column.OTHER_SQUARED_PROBS in wanted:
            columns[Column.OTHER_SQUARED_PROBS] = other_squared_probs(scaled - logsumexp[:, None], drawn.token_ids)
        if wanted & DIVERGENCES:
            columns |= _divergences(_behavior(drawn), scaled - logsumexp[:, None], wanted)
    return Scores(logprobs=logprobs, columns=columns)


def available_divergences(distributions: Sequence[Distribution | None]) -> frozenset[Column]:
    """Return the divergences that a batch with these distributions can be asked for."""
    if any(entry is None for entry in distributions):
        return frozenset()
    if all(entry is not None and entry.complete for entry in distributions):
        return DIVERGENCES
    return frozenset({Column.KL_LOWER_BOUND})


def unit_logprobs(drawn: Drawn) -> Tensor:
    """Return log pi [n] of the drawn tokens at temperature 1 over the whole vocabulary."""
    return _chosen(drawn.logits, drawn.token_ids) - drawn.logits.logsumexp(-1)


def other_squared_probs(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """Return the sum [n] of pi^2 over all tokens but the drawn one, from log pi [n, V], with nothing to cancel."""
    return (2 * logprobs).exp().scatter(-1, token_ids[:, None], 0.0).sum(-1)


def first_logits(drawn: Drawn) -> Tensor:
    """Return the raw logit [b] of each row's first trained token."""
    return drawn.logits[drawn.starts, drawn.token_ids[drawn.starts]]


def _chosen(values: Tensor, token_ids: Tensor) -> Tensor:
    return values.gather(-1, token_ids[:, None]).squeeze(-1)


def _divergences(behavior: Tensor, policy: Tensor, wanted: frozenset[Column]) -> dict[Column, Tensor]:
    columns: dict[Column, Tensor] = {}
    if Column.EXACT_KL in wanted:
        columns[Column.EXACT_KL] = kl_divergence(behavior, policy)
    if Column.EXACT_TV in wanted:
        columns[Column.EXACT_TV] = total_variation(behavior, policy)
    if Column.KL_LOWER_BOUND in wanted:
        columns[Column.KL_LOWER_BOUND] = kl_lower_bound(behavior, policy)
    return columns


def _behavior(drawn: Drawn) -> Tensor:
    """[n, V]: the shipped log-probs of each token's distribution, -inf for ids that were not shipped."""
    behavior = torch.full(drawn.logits.shape, -torch.inf)
    start = 0
    for entry, row_mask in zip(drawn.distributions, drawn.mask, strict=True):
        assert entry is not None, "divergences were asked of a batch without distributions"
        of_row = behavior[start : start + int(row_mask.sum())]
        if entry.kept is None:
            of_row[:, : entry.logprobs.shape[1]] = entry.logprobs[row_mask[: len(entry.logprobs)]]
        else:
            of_row[_owners(entry.kept, row_mask), entry.kept.token_ids] = entry.logprobs
        start += len(of_row)
    return behavior.to(drawn.logits.device)


def _support(kept: Sequence[Kept | None], mask: Tensor, vocab_size: int, device: torch.device) -> Tensor | None:
    if all(entry is None for entry in kept):
        return None
    support = torch.ones(int(mask.sum()), vocab_size, dtype=torch.bool)
    start = 0
    for entry, row_mask in zip(kept, mask, strict=True):
        length = int(row_mask.sum())
        if entry is not None:
            support[start : start + length] = False
            support[start + _owners(entry, row_mask), entry.token_ids] = True
        start += length
    return support.to(device)


def _owners(kept: Kept, row_mask: Tensor) -> Tensor:
    """Return [K] for each kept id which of the row's trained tokens it belongs to; counts are 0 behind the mask."""
    counts = kept.counts[row_mask[: len(kept.counts)]]
    return torch.arange(len(counts)).repeat_interleave(counts)
