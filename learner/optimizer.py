"""AdamW and its learning-rate schedule, a pure function of the number of updates done."""

import math

import torch

from learner.policy import Policy
from learner.settings import OptimizerSettings


def make_optimizer(policy: Policy, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Build AdamW over all parameters that are trained; its lr is set before each step."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def learning_rate(settings: OptimizerSettings, *, updates_done: int, total_updates: int) -> float:
    """Return the rate of the next update: a linear rise, then constant, or a fall that reaches 0 after the last one."""
    warmup = settings.warmup_updates
    if updates_done < warmup:
        return settings.lr * (updates_done + 1) / warmup
    progress = min(1.0, (updates_done - warmup) / max(1, total_updates - warmup))
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.lr * factor[settings.schedule]
