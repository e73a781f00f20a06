"""One update, from a batch to moved weights; no I/O.

Legend: B trajectories, T response positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue, TypeAdapter

from buffer.errors import InvalidSettings, StalewiseError
from buffer.types import PolicyVersion
from learner.collate import Batch
from learner.distributed import whole
from learner.errors import GradientSpike, NonFiniteGradient, TrustRegionClosed
from learner.importance import importance_weights
from learner.metrics import batch_metrics
from learner.objectives.composition import NonFiniteLoss
from learner.objectives.objective import Loss, Objective
from learner.optimizer import learning_rate, make_optimizer
from learner.policy import Forward, Policy
from learner.reference import REFERENCE_COLUMNS, Reference
from learner.scoring import available_divergences
from learner.settings import LearnerSettings
from learner.spikes import SpikeGuard
from learner.tokens import DIVERGENCES, NonFiniteTokens, Tokens

Diagnose = Callable[[Tokens, Loss], Mapping[str, float]]
"""What is worth knowing about a batch and its loss, by metric name (learner.objectives.diagnostics)."""


SKIPPED: Mapping[type[StalewiseError], str] = {
    NonFiniteTokens: "non_finite_tokens",
    NonFiniteLoss: "non_finite_loss",
    NonFiniteGradient: "non_finite_gradient",
    GradientSpike: "gradient_spike",
}
"""What an update is skipped for, and the name that it is counted under."""

_CLOSED_UPDATES = TypeAdapter(dict[str, int])
_NORMS = TypeAdapter(list[float])


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the learner is. The two differ once a resumed run has skipped versions published before a crash."""

    updates: int = 0
    """Optimiser steps that made these weights; schedules follow it."""
    clock: PolicyVersion = 0
    """The policy version that these weights have or will have; ages are measured against it."""


class Trainer:
    """The policy, its optimiser, the reference and the multipliers: everything that an update moves."""

    def __init__(
        self,
        *,
        policy: Policy,
        objective: Objective,
        settings: LearnerSettings,
        diagnose: Diagnose,
        now: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.optimizer = make_optimizer(policy, settings.optimizer)
        self.multipliers = objective.initial_multipliers()
        self.reference = _make_reference(policy, objective, settings)
        self.progress = Progress()
        self.log_ratios = torch.zeros(0, 0)
        """[B, T] float32: log pi / behavior of the last batch, before its update; 0 behind the mask."""
        self._settings = settings
        self._diagnose = diagnose
        self._now = now
        self._closed_updates: dict[str, int] = {}
        self._spikes = SpikeGuard(settings.optimizer.spike_factor)

    def update(self, batch: Batch) -> dict[str, float]:
        """Move the weights by one batch and return the metrics of the update.

        Raises one of SKIPPED with weights, optimiser, clock and multipliers as before;
        TrustRegionClosed after the last of too many updates in which a gate closed every token.
        """
        started_s = self._now()
        # divergences are computed wherever they can be: diagnostics then report them instead of estimates
        wanted = self.objective.columns - REFERENCE_COLUMNS - DIVERGENCES
        forward = self.policy.forward(batch, wanted | available_divergences(batch.distributions))
        tokens = self.tokens(batch, forward)
        loss = self.objective(tokens, self.multipliers)
        forward_s = self._now()
        self.optimizer.zero_grad()
        weights = importance_weights(batch.draw_rates, self._settings.sampler_correction)
        self.policy.backward(batch, forward, loss.total, row_weights=None if weights is None else weights[batch.group])
        backward_s = self._now()
        gradient_norm, lr = self._descend(loss)
        detached = _detached(tokens)
        with torch.no_grad():
            used = self.multipliers
            self.multipliers = self.objective.next_multipliers(detached, used)
            diagnoses = self._diagnose(detached, loss)
            self.log_ratios = (
                torch.where(detached.mask, detached.logprobs - detached.behavior_logprobs, 0.0).float().cpu()
            )
        self._advance()
        self._watch_gates(loss, tokens)
        return {
            **diagnoses,
            **batch_metrics(batch),
            **({} if self.reference is None else self.reference.metrics()),
            "sampler/weight_max": 1.0 if weights is None else float(weights.max()),
            "loss/total": loss.total.item(),
            **{f"loss/{name}": part.item() for name, part in loss.parts.items()},
            **{f"multiplier/{name}": value for name, value in used.items()},
            "gradient/norm": gradient_norm,
            "optimizer/lr": lr,
            "time/forward_s": forward_s - started_s,
            "time/backward_s": backward_s - forward_s,
            "time/rest_of_step_s": self._now() - backward_s,
        }

    def trackers(self) -> dict[str, JsonValue]:
        """Return what is remembered from update to update beside weights, optimiser and multipliers."""
        return {"closed_updates": dict(self._closed_updates), "gradient_norms": [*self._spikes.norms]}

    def restore(self, *, progress: Progress, multipliers: dict[str, float], trackers: Mapping[str, JsonValue]) -> None:
        """Take over the counters of a checkpoint. Raises InvalidSettings when it was made with another objective."""
        if multipliers.keys() != self.multipliers.keys():
            raise InvalidSettings(
                f"the checkpoint has the multipliers {sorted(multipliers)}, "
                f"objective {self.objective.name} has {sorted(self.multipliers)}",
                hint="resume with the objective of the checkpoint, or start a new run",
            )
        self.progress = progress
        self.multipliers = multipliers
        self._closed_updates = _CLOSED_UPDATES.validate_python(trackers["closed_updates"])
        self._spikes.restore(_NORMS.validate_python(trackers["gradient_norms"]))

    def tokens(self, batch: Batch, forward: Forward) -> Tokens:
        """Join the data, the scores and the reference columns to the record that the objective reads."""
        device = forward.scores.logprobs.device
        columns = dict(forward.scores.columns)
        if self.reference is not None:
            wanted = self.objective.columns & REFERENCE_COLUMNS
            computed = self.reference.columns(batch)
            columns |= {column: computed[column].to(device) for column in wanted}
        return Tokens(
            logprobs=forward.scores.logprobs,
            behavior_logprobs=batch.behavior_logprobs.to(device),
            mask=batch.mask.to(device),
            rewards=batch.rewards.to(device),
            group=batch.group.to(device),
            episode=batch.episode.to(device),
            age_updates=batch.age_updates.to(device),
            token_rewards=None if batch.token_rewards is None else batch.token_rewards.to(device),
            columns=columns,
        )

    def _descend(self, loss: Loss) -> tuple[float, float]:
        """Clip, set the scheduled rate and step; return the norm before clipping and the rate."""
        moving = [parameter for parameter in self.policy.model.parameters() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in moving if parameter.grad is not None])
        norm = whole(total).item()
        if not math.isfinite(norm):  # before clipping, which would spread one nan over all gradients
            raise self._non_finite(loss)
        self._spikes.admit(norm)
        torch.nn.utils.clip_grads_with_norm_(moving, self._settings.optimizer.grad_clip_norm, total)
        lr = learning_rate(
            self._settings.optimizer,
            updates_done=self.progress.updates,
            total_updates=self._settings.total_updates,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return norm, lr

    def _non_finite(self, loss: Loss) -> NonFiniteGradient:
        bad = [
            name
            for name, parameter in self.policy.model.named_parameters()
            if parameter.grad is not None and not whole(parameter.grad).isfinite().all()
        ]
        parts = ", ".join(f"{name} {float(part):g}" for name, part in loss.parts.items())
        return NonFiniteGradient(
            f"update {self.progress.updates}: the gradient of {len(bad)} parameters is not finite, first "
            f"{bad[0] if bad else 'none (their norm overflows)'} (loss {float(loss.total.detach()):g}: {parts})",
            hint="lower learner.optimizer.lr or the coefficient of the largest part",
        )

    def _watch_gates(self, loss: Loss, tokens: Tokens) -> None:
        for name, gate in loss.gates.items():
            closed = not bool((gate & tokens.mask).any())
            self._closed_updates[name] = self._closed_updates.get(name, 0) + 1 if closed else 0
            if self._closed_updates[name] >= self._settings.max_closed_updates:
                raise TrustRegionClosed(
                    f"gate {name} closed every token of the last {self._closed_updates[name]} updates: the policy is "
                    "outside its trust region and learns nothing any more",
                    hint="raise the threshold (the metrics trust_region/* say which accepts how much), "
                    "lower learner.optimizer.lr, or train on fresher data",
                )

    def _advance(self) -> None:
        self.progress = Progress(self.progress.updates + 1, self.progress.clock + 1)
        every = self._settings.reference_reset_every
        if self.reference is not None and every is not None and self.progress.updates % every == 0:
            self.reference.reset(self.policy, reference_id=f"update-{self.progress.updates}")


def _make_reference(policy: Policy, objective: Objective, settings: LearnerSettings) -> Reference | None:
    if objective.columns & REFERENCE_COLUMNS:
        return Reference(policy, reference_id="update-0", cache_bytes=settings.reference_cache_bytes)
    if settings.reference_reset_every is not None:
        raise InvalidSettings(
            f"learner.reference_reset_every={settings.reference_reset_every} but objective {objective.name} "
            "uses no reference",
            hint="remove the setting, or choose an objective with a reference such as reval",
        )
    return None


def _detached(tokens: Tokens) -> Tokens:
    columns = {column: value.detach() for column, value in tokens.columns.items()}
    return replace(tokens, logprobs=tokens.logprobs.detach(), columns=columns)
