"""What trust regions would accept of a batch, and how far the surrogate can be trusted on it: numbers, no gradient.

Names end in `_estimate` where sampled stand-ins say it, in `_lower_bound` where the shipped ids are a part of the
vocabulary, in neither where every token brought its whole distribution.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from learner.objectives.aggregation import maximum_by_sequence, mean_by_sequence
from learner.objectives.bounds import error_bounds
from learner.objectives.ratios import deviation, k2, k3
from learner.tokens import Column, Tokens

THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Where the acceptance curve is read, from the tightest threshold in use to one that one wild token passes."""

ACCEPTANCES = (50, 70, 90)
"""Per cent of the sequences whose thresholds are reported; the paper works at 70 and above."""


@torch.no_grad()
def acceptance_curve(tokens: Tokens) -> dict[str, Tensor]:
    """Return [] each: the lowest thresholds that keep ACCEPTANCES by each statistic, the shares THRESHOLDS keep."""
    metrics: dict[str, Tensor] = {}
    for name, suffix, values in _statistics(tokens):
        ascending = values.sort().values
        for percent in ACCEPTANCES:
            rank = -(-percent * len(ascending) // 100)  # a value between two ranks would keep fewer than it says
            metrics[f"trust_region/{name}_p{percent}{suffix}"] = ascending[rank - 1]
        for threshold in THRESHOLDS:
            kept = (values <= threshold).float().mean()
            metrics[f"trust_region/{name}_within_{f'{threshold:g}'.replace('.', '_')}_share{suffix}"] = kept
    return metrics


@torch.no_grad()
def bound_metrics(tokens: Tokens, sequences: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the error bounds of each set of sequences, [B] bool by a prefix of names, and what they are made of.

    Largest divergences are those of the contexts in the set, expectations are means over its sequences, and the total
    variation of whole sequences is bounded by Pinsker and by the sum of its tokens'. An empty set has none.
    """
    if tokens.columns.keys() >= {Column.EXACT_KL, Column.EXACT_TV}:
        suffix, kl, tv = "", tokens.columns[Column.EXACT_KL], tokens.columns[Column.EXACT_TV]
        largest = kl
    else:
        suffix, kl, tv = "_estimate", k3(tokens), deviation(tokens) / 2
        largest = k2(tokens)
    distances = {
        prefix: _distances(tokens, chosen, largest=largest, kl=kl, tv=tv)
        for prefix, chosen in sequences.items()
        if chosen.any()
    }
    return {
        f"trust_region/{prefix}{name}{suffix}": value
        for prefix, (max_kl, max_tv, sequence_kl, *mean_tv) in distances.items()
        for name, value in _bounds(max_kl, max_tv, sequence_kl, mean_tv).items()
    }


def acceptance_sentence(metrics: Mapping[str, float]) -> str:
    """Return the thresholds that keep each share of ACCEPTANCES in one line, from the metrics of one step."""
    curves = [
        f"{name}{suffix} " + " / ".join(f"{metrics[f'trust_region/{name}_p{p}{suffix}']:.3g}" for p in ACCEPTANCES)
        for name, suffix in re.findall(rf"trust_region/(\w+)_p{ACCEPTANCES[0]}(\w*)", " ".join(metrics))
    ]
    return f"thresholds that keep {' / '.join(map(str, ACCEPTANCES))} % of the sequences: {', '.join(curves)}"


def _statistics(tokens: Tokens) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, suffix and [B] values of what a sequence is accepted by."""
    yield "max_k2_nats", "_estimate", maximum_by_sequence(tokens, k2(tokens))[:, 0]
    yield "mean_k3_nats", "_estimate", mean_by_sequence(tokens, k3(tokens))[:, 0]
    yield "mean_deviation", "_estimate", mean_by_sequence(tokens, deviation(tokens))[:, 0]
    if Column.EXACT_KL in tokens.columns:
        suffix, kl = "", tokens.columns[Column.EXACT_KL]
    elif Column.KL_LOWER_BOUND in tokens.columns:
        suffix, kl = "_lower_bound", tokens.columns[Column.KL_LOWER_BOUND]
    else:
        return
    yield "max_kl_nats", suffix, maximum_by_sequence(tokens, kl)[:, 0]
    yield "mean_kl_nats", suffix, mean_by_sequence(tokens, kl)[:, 0]


def _distances(tokens: Tokens, chosen: Tensor, *, largest: Tensor, kl: Tensor, tv: Tensor) -> list[float]:
    """3 + T numbers: max KL, max TV, mean KL of a sequence, then the mean TV of each trained token's context."""
    mask, count = tokens.mask & chosen[:, None], chosen.sum()
    per_token = tv.new_zeros(int(mask.sum(-1).max()), dtype=torch.float64)
    place = (mask.cumsum(-1) - 1)[mask]
    mean_tv = per_token.index_add(0, place, tv[mask].double()) / count
    whole = [
        torch.where(mask, largest, 0.0).amax().double(),
        torch.where(mask, tv, 0.0).amax().clamp(max=1.0).double(),
        torch.where(mask, kl, 0.0).double().sum() / count,
    ]
    numbers: list[float] = torch.cat([torch.stack(whole), mean_tv.clamp(max=1.0)]).tolist()
    return numbers


def _bounds(max_kl: float, max_tv: float, sequence_kl: float, mean_tv: list[float]) -> dict[str, float]:
    bounds = error_bounds(
        max_tv=max_tv,
        max_kl=max_kl,
        sequence_kl=sequence_kl,
        sequence_tv=min((sequence_kl / 2) ** 0.5, sum(mean_tv)),
        mean_tv=torch.tensor(mean_tv, dtype=torch.float64),
    )
    return {
        "kl_nats_max": max_kl,
        "tv_max": max_tv,
        "sequence_kl_nats_mean": sequence_kl,
        **{f"bound_{name}": bound for name, bound in bounds.items()},
        "bound_vacuous": float(bounds["best"] >= 1.0),
    }
