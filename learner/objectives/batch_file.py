"""A batch in a JSON file, and a loss computed on it, so that every formula can be checked from outside."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from buffer.errors import InvalidRequest
from buffer.settings import Settings
from buffer.types import MASS_TOLERANCE, VersionSpan
from learner.divergence import kl_divergence, kl_lower_bound, total_variation
from learner.objectives.diagnostics import diagnose
from learner.objectives.recipes import build_objective
from learner.tokens import PER_TRAJECTORY, Column, Tokens

_DIFFERENTIABLE = (Column.UNIT_LOGPROBS, Column.FIRST_LOGIT)


class TrajectoryEntry(Settings):
    """One trajectory. T = response positions. Behind the mask any number will do, nan too."""

    logprobs: list[float] | None = None
    """[T] log pi of each token under its sampling settings; left out when `logits` give it."""
    behavior_logprobs: list[float]
    """[T] log-probs under the policy that drew the tokens."""
    reward: float
    """Of the whole trajectory."""
    group: str
    """Trajectories of one prompt share it."""
    mask: list[bool] | None = None
    """[T] which tokens count; all when left out."""
    episode: str | None = None
    """Trajectories of one episode share it, within their group; its own when left out."""
    spans: list[VersionSpan] | None = None
    """Runs of tokens by policy version, tiling [0, T); all foreign when left out."""
    columns: dict[Column, list[float] | float] = Field(default_factory=dict)
    """[T] each; one number for `first_logit` and `reference_first_logit`."""
    logits: list[list[float]] | None = None
    """[T][V] raw logits of the policy, for small vocabularies: give `logprobs` and the policy's columns."""
    reference_logits: list[list[float]] | None = None
    """[T][V] raw logits of the reference: give its columns."""
    behavior_logits: list[list[float]] | None = None
    """[T][V] raw logits of the policy that drew the tokens: with `logits` they give the divergences."""
    token_ids: list[int] | None = None
    """[T] the tokens that were drawn; needed with logits."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """They were drawn at; turns `logits` into `logprobs`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.logprobs is None) == (self.logits is None):
            raise ValueError("give either logprobs or logits")
        if (self.logits or self.reference_logits) and self.token_ids is None:
            raise ValueError("logits need token_ids")
        if self.behavior_logits and not self.logits:
            raise ValueError("behavior_logits need logits: a divergence is between the two")
        sized: dict[str, Sequence[object] | None] = {
            "logprobs": self.logprobs,
            "mask": self.mask,
            "logits": self.logits,
            "reference_logits": self.reference_logits,
            "behavior_logits": self.behavior_logits,
            "token_ids": self.token_ids,
        }
        for column, value in self.columns.items():
            if isinstance(value, list) == (column in PER_TRAJECTORY):
                raise ValueError(f"columns.{column} must be {'one number' if column in PER_TRAJECTORY else 'a list'}")
            if isinstance(value, list):
                sized[f"columns.{column}"] = value
        length = len(self.behavior_logprobs)
        for name, values in sized.items():
            if values is not None and len(values) != length:
                raise ValueError(f"{name} has {len(values)} entries for {length} behavior_logprobs")
        if not any(self.trained):
            raise ValueError("no token is trained")
        if self.spans and [s.start for s in self.spans] + [length] != [0] + [s.end for s in self.spans]:
            raise ValueError(f"spans must tile the {length} tokens in order")
        return self

    @property
    def trained(self) -> list[bool]:
        """[T] the mask, all True when it was left out."""
        return [True] * len(self.behavior_logprobs) if self.mask is None else self.mask


class BatchFile(Settings):
    """A batch to compute a loss on."""

    trajectories: Annotated[list[TrajectoryEntry], Field(min_length=1)]
    """Whole groups."""
    learner_version: Annotated[int, Field(ge=0)] = 0
    """The clock that ages are measured against."""
    multipliers: dict[str, float] = Field(default_factory=dict)
    """Of the objective, such as `variance`; those left out are at their start."""


def evaluated(name: str, options: Mapping[str, object], path: Path) -> dict[str, object]:
    """Return what objective `name` says about the batch in `path`, ready for JSON.

    loss; parts; gradients: by differentiable field, per trajectory, d loss / d value of each token (0 behind the mask)
    or of the first logit; gates: which tokens keep their gradient; next_multipliers; metrics.
    Raises InvalidSettings for the objective, InvalidRequest for the file, and what the objective raises.
    """
    objective, batch = build_objective(name, options), read_batch(path)
    tokens = batch_tokens(batch)
    multipliers = objective.initial_multipliers() | batch.multipliers
    loss = objective(tokens, multipliers)
    leaves = {"logprobs": tokens.logprobs}
    leaves |= {column.value: tokens.columns[column] for column in _DIFFERENTIABLE if column in objective.columns}
    gradients = torch.autograd.grad(loss.total, list(leaves.values()), allow_unused=True)
    return {
        "objective": name,
        "denominator": objective.denominator,
        "loss": loss.total.item(),
        "parts": {part: value.item() for part, value in loss.parts.items()},
        "gradients": {
            leaf: _unpadded(batch, torch.zeros_like(leaves[leaf]) if gradient is None else gradient)
            for leaf, gradient in zip(leaves, gradients, strict=True)
        },
        "gates": {gate: _unpadded(batch, is_open) for gate, is_open in loss.gates.items()},
        "next_multipliers": objective.next_multipliers(tokens, multipliers),
        "metrics": diagnose(tokens, loss),
    }


def read_batch(path: Path) -> BatchFile:
    """Read a batch file. Raises InvalidRequest with the place of the first problem."""
    try:
        return BatchFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequest(f"{path}: {place}: {problem['msg']}", hint="docs/objectives.md has the format") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InvalidRequest(f"{path} is not JSON: {error}", hint="docs/objectives.md has the format") from None


def batch_tokens(batch: BatchFile) -> Tokens:
    """Return the batch as tensors; what is differentiable is a leaf."""
    entries = batch.trajectories
    scored = [_scored(entry) for entry in entries]
    columns: dict[Column, Tensor] = {}
    for column in Column:
        parts = [found[column] for _, found in scored if column in found]
        if len(parts) == len(entries):
            columns[column] = torch.cat(parts) if column in PER_TRAJECTORY else _padded(parts, 0.0)
    episodes = [index if entry.episode is None else (entry.group, entry.episode) for index, entry in enumerate(entries)]
    return Tokens(
        logprobs=_padded([logprobs for logprobs, _ in scored], 0.0).requires_grad_(),
        behavior_logprobs=_padded([torch.tensor(entry.behavior_logprobs) for entry in entries], 0.0),
        mask=_padded([torch.tensor(entry.trained) for entry in entries], 0.0),
        rewards=torch.tensor([entry.reward for entry in entries]),
        group=_numbered([entry.group for entry in entries]),
        episode=_numbered(episodes),
        age_updates=_padded([_ages(entry, batch.learner_version) for entry in entries], -1),
        columns={
            column: values.requires_grad_() if column in _DIFFERENTIABLE else values
            for column, values in columns.items()
        },
    )


def _scored(entry: TrajectoryEntry) -> tuple[Tensor, dict[Column, Tensor]]:
    """Log-probs [T] and columns, [T] or [1], of one trajectory; given columns win over computed ones."""
    given = {name: torch.tensor(column).reshape(-1) for name, column in entry.columns.items()}
    if entry.token_ids is None:
        return torch.tensor(entry.logprobs), given
    ids, first = torch.tensor(entry.token_ids), entry.trained.index(True)
    computed: dict[Column, Tensor] = {}
    if entry.reference_logits is not None:
        raw = _logits("reference_logits", entry.reference_logits, ids)
        computed[Column.REFERENCE_LOGPROBS] = _chosen(raw.log_softmax(-1), ids)
        computed[Column.REFERENCE_FIRST_LOGIT] = _chosen(raw, ids)[first : first + 1]
    if entry.logits is None:
        return torch.tensor(entry.logprobs), computed | given
    raw = _logits("logits", entry.logits, ids)
    logprobs = (raw / entry.temperature).log_softmax(-1)
    computed[Column.UNIT_LOGPROBS] = _chosen(raw.log_softmax(-1), ids)
    computed[Column.FIRST_LOGIT] = _chosen(raw, ids)[first : first + 1]
    computed[Column.ENTROPY] = torch.special.entr(logprobs.exp()).sum(-1)
    squares = (2 * logprobs).exp().scatter(-1, ids[:, None], 0.0)
    computed[Column.OTHER_SQUARED_PROBS] = squares.sum(-1)
    if entry.behavior_logits is not None:
        computed |= _divergences(entry, logprobs, ids)
    return _chosen(logprobs, ids), computed | given


def _divergences(entry: TrajectoryEntry, policy: Tensor, ids: Tensor) -> dict[Column, Tensor]:
    """[T] each. Raises InvalidRequest when the logits contradict the behaviour log-probs of drawn tokens."""
    raw = _logits("behavior_logits", entry.behavior_logits or [], ids)
    if raw.shape != policy.shape:
        raise InvalidRequest(f"behavior_logits are {list(raw.shape)}, logits {list(policy.shape)}: give one vocabulary")
    behavior = (raw / entry.temperature).log_softmax(-1)
    trained, stated = torch.tensor(entry.trained), torch.tensor(entry.behavior_logprobs)
    apart = (_chosen(behavior, ids) - stated)[trained].abs().max().item()
    if not apart <= MASS_TOLERANCE:
        raise InvalidRequest(f"behavior_logits and behavior_logprobs differ by {apart:.3g} nats at a drawn token")
    return {
        Column.EXACT_KL: kl_divergence(behavior, policy),
        Column.EXACT_TV: total_variation(behavior, policy),
        Column.KL_LOWER_BOUND: kl_lower_bound(behavior, policy),
    }


def _logits(name: str, rows: list[list[float]], ids: Tensor) -> Tensor:
    """[T, V]. Raises InvalidRequest for ragged rows and for ids outside them."""
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or not 0 <= int(ids.min()) <= int(ids.max()) < widths[0]:
        raise InvalidRequest(f"{name}: rows have {widths} entries; they need one width, and token_ids below it")
    return torch.tensor(rows)


def _chosen(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[:, None])[:, 0]


def _ages(entry: TrajectoryEntry, learner_version: int) -> Tensor:
    ages = torch.full((len(entry.behavior_logprobs),), -1)
    for span in entry.spans or []:
        if span.version is not None:
            ages[span.start : span.end] = max(learner_version - span.version, 0)
    return ages


def _padded(rows: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _numbered(names: Sequence[Hashable]) -> Tensor:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def _unpadded(batch: BatchFile, values: Tensor) -> list[object]:
    if values.dim() == 1:
        return values.tolist()
    return [row[: len(entry.behavior_logprobs)].tolist() for row, entry in zip(values, batch.trajectories, strict=True)]
