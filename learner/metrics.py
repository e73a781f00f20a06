"""Numbers about the data of one update, by name."""

from collections.abc import Sequence

import numpy as np
import torch

from learner.collate import Batch


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Return rewards, sizes, ages (learner clock - oldest span version of a group) and reuse of one batch."""
    best = torch.full((len(batch.times_sampled),), -torch.inf).scatter_reduce(0, batch.group, batch.rewards, "amax")
    worst = torch.full((len(batch.times_sampled),), torch.inf).scatter_reduce(0, batch.group, batch.rewards, "amin")
    return {
        "reward/mean": float(batch.rewards.mean()),
        "reward/group_best_mean": float(best.mean()),
        "reward/group_equal_share": float((best == worst).float().mean()),
        "batch/groups": float(len(batch.times_sampled)),
        "batch/trajectories": float(len(batch.keys)),
        "batch/trained_tokens": float(batch.mask.sum()),
        "response/trained_tokens_mean": float(batch.mask.sum(-1).float().mean()),
        "reuse/times_mean": float(np.mean(batch.times_sampled)),
        **_age_metrics(batch.group_ages_updates),
    }


def _age_metrics(ages_updates: Sequence[int | None]) -> dict[str, float]:
    own = [age for age in ages_updates if age is not None]
    metrics = {"age/foreign_share": 1 - len(own) / len(ages_updates)}
    if own:
        metrics["age/updates_p50"] = float(np.percentile(own, 50))
        metrics["age/updates_p90"] = float(np.percentile(own, 90))
        metrics["age/updates_max"] = float(max(own))
    return metrics
