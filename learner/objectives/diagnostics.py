"""What one step did to data of each age: numbers for the metrics, no gradient, few transfers to the host."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from buffer.staleness import AGE_BUCKETS
from learner.objectives.acceptance import acceptance_curve, bound_metrics
from learner.objectives.objective import Loss
from learner.objectives.ratios import k1, k2, k3, token_ratio
from learner.tokens import DIVERGENCES, Tokens, cleaned

_FIRST_AGES = tuple(AGE_BUCKETS.values())[1:]

_QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@torch.no_grad()
def diagnose(tokens: Tokens, loss: Loss) -> dict[str, float]:
    """Return the metrics of one step, named noun/quantity_unit_statistic; a bucket without tokens has none.

    `ratio/p01` ... `ratio/p99`: quantiles over all trained tokens.
    `ratio/mean`, `ratio/age_4_15_mean`: over all trained tokens, and over one bucket; so too variance and max,
    `k1..k3/nats_mean`, `effective_samples/share` and `gate/NAME_closed_share`. `age/age_4_15_tokens_share`. Over all
    sequences, and over those whose oldest token is in the bucket: `gate/NAME_sequences_kept_share`; the error bounds
    `trust_region/...` (acceptance.py, so too the acceptance curve of the batch); `watched/NAME_mean` and
    `_absolute_mean` of what the loss watches a sequence, left out where that is nan.
    """
    tokens = cleaned(tokens, tokens.columns.keys() & DIVERGENCES)
    everyone = torch.ones_like(tokens.rewards, dtype=torch.bool)
    sequences = {"": everyone, **_sequences_by_age(tokens)}
    metrics: dict[str, Tensor] = {}
    for name, seen in loss.watched.items():
        for age, values in _shared_out(seen.float(), sequences):
            metrics[f"watched/{name}_{age}mean"] = values.mean()
            metrics[f"watched/{name}_{age}absolute_mean"] = values.abs().mean()
    for name, gate in loss.gates.items():
        for age, values in _shared_out((gate & tokens.mask).any(-1).float(), sequences):
            metrics[f"gate/{name}_{age}sequences_kept_share"] = values.mean()
    metrics |= acceptance_curve(tokens)
    numbers = zip(metrics, torch.stack([value.double().cpu() for value in metrics.values()]).tolist(), strict=True)
    known = {name: number for name, number in numbers if not math.isnan(number)}
    return known | bound_metrics(tokens, sequences) | _by_age(tokens, loss.gates)


def _sequences_by_age(tokens: Tokens) -> dict[str, Tensor]:
    """Name of an age -> [B] bool: the sequences whose oldest trained token is in it; one foreign token is enough."""
    is_foreign = (tokens.mask & (tokens.age_updates < 0)).any(-1)
    oldest = torch.where(tokens.mask, tokens.age_updates, -1).amax(-1)
    bucket = _bucket(torch.where(is_foreign, -1, oldest))
    return {f"age_{name}_": (bucket == number) & (tokens.lengths > 0) for number, name in enumerate(AGE_BUCKETS)}


def _shared_out(seen: Tensor, sequences: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the values [B] of each set of sequences; a value of the whole batch [] has no part in them."""
    if not seen.dim():
        yield "", seen
        return
    for age, chosen in sequences.items():
        yield age, seen[chosen]


def _bucket(ages: Tensor) -> Tensor:
    """Number of the age bucket; -1 updates is foreign."""
    return torch.bucketize(ages, torch.tensor(_FIRST_AGES, device=ages.device), right=True)


def _by_age(tokens: Tokens, gates: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics over all tokens and per bucket, from sums: count, rho, rho^2, k1, k2, k3, closed by each gate."""
    mask = tokens.mask
    bucket = _bucket(tokens.age_updates[mask])
    ratio = token_ratio(tokens)[mask].double()
    columns = [torch.ones_like(ratio), ratio, ratio.square()]
    columns += [statistic(tokens)[mask].double() for statistic in (k1, k2, k3)]
    columns += [(~gate[mask]).double() for gate in gates.values()]
    table = torch.stack(columns, -1)  # (N, columns)
    sums = table.new_zeros(len(AGE_BUCKETS), len(columns)).index_add(0, bucket, table)
    maxima = ratio.new_zeros(len(AGE_BUCKETS)).scatter_reduce(0, bucket, ratio, "amax")
    rows = torch.cat([sums, maxima[:, None]], -1).tolist()
    total = [*(sum(column) for column in zip(*(row[:-1] for row in rows), strict=True)), max(row[-1] for row in rows)]
    metrics: dict[str, float] = {}
    for name, row in zip(AGE_BUCKETS, rows, strict=True):
        metrics |= _bucket_metrics(f"age_{name}_", row, gates=tuple(gates))
        metrics[f"age/age_{name}_tokens_share"] = row[0] / max(total[0], 1)
    return metrics | _bucket_metrics("", total, gates=tuple(gates)) | _quantiles(ratio)


def _quantiles(ratio: Tensor) -> dict[str, float]:
    """Nearest ranks of the ratios of all trained tokens."""
    count = len(ratio)
    if not count:
        return {}
    ranks = torch.tensor([round(share * (count - 1)) for share in _QUANTILES.values()], device=ratio.device)
    values = ratio.sort().values[ranks].tolist()
    return {f"ratio/{name}": value for name, value in zip(_QUANTILES, values, strict=True)}


def _bucket_metrics(age: str, row: list[float], *, gates: tuple[str, ...]) -> dict[str, float]:
    count, ratio, squares, k1_sum, k2_sum, k3_sum, *closed, largest = row
    if not count:
        return {}
    mean = ratio / count
    return {
        f"ratio/{age}mean": mean,
        f"ratio/{age}variance": max(squares / count - mean**2, 0.0),
        f"ratio/{age}max": largest,
        f"effective_samples/{age}share": ratio**2 / (count * squares),
        f"k1/{age}nats_mean": k1_sum / count,
        f"k2/{age}nats_mean": k2_sum / count,
        f"k3/{age}nats_mean": k3_sum / count,
        **{f"gate/{gate}_{age}closed_share": total / count for gate, total in zip(gates, closed, strict=True)},
    }
