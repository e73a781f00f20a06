"""The policy: a Hugging Face causal LM, scored and differentiated in micro-batches of bounded size.

Legend: B trajectories, T response positions, n trained tokens of a micro-batch.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from buffer.errors import InvalidSettings
from learner.collate import Batch
from learner.errors import CorruptCheckpoint
from learner.scoring import Scores, draw, score
from learner.tokens import Column

PER_TRAJECTORY = frozenset({Column.FIRST_LOGIT, Column.REFERENCE_FIRST_LOGIT})
"""Columns with one number a trajectory; the others have one a token."""

_DIFFERENTIABLE = frozenset({Column.UNIT_LOGPROBS, Column.FIRST_LOGIT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """The policy's scores of a whole batch. Gradients flow to the model, or stop at leaves (several micro-batches)."""

    scores: Scores  # logprobs and columns [B, T], `first_logit` [B]
    rows: tuple[Tensor, ...]  # the micro-batches: trajectory numbers
    wanted: frozenset[Column]


class Policy:
    """A causal LM whose weights one optimiser moves. Always in evaluation mode: dropout would falsify every ratio."""

    def __init__(self, model: PreTrainedModel, *, micro_batch_tokens: int) -> None:
        self.model = model.eval()
        self._micro_batch_tokens = micro_batch_tokens

    @classmethod
    def load(cls, model_dir: Path, *, device: str, micro_batch_tokens: int) -> Self:
        """Load float32 weights from a local directory. Raises InvalidSettings when that cannot be."""
        try:
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidSettings(f"{model_dir} does not hold a causal language model: {error}") from error
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it was not built for
            raise InvalidSettings(f"learner.device={device!r} cannot be used: {error}") from error
        return cls(model, micro_batch_tokens=micro_batch_tokens)

    @property
    def vocab_size(self) -> int:
        """Token ids must be below it."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def max_positions(self) -> int:
        """Tokens of a sequence that the model was made for."""
        return int(self.model.config.max_position_embeddings)

    def frozen_copy(self) -> "Policy":
        """Return a copy without gradients: a reference."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, micro_batch_tokens=self._micro_batch_tokens)

    def weights(self) -> dict[str, Tensor]:
        """Return views of all weights by checkpoint name, tied ones once."""
        tied = set(self.model.all_tied_weights_keys)
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite all weights. Raises CorruptCheckpoint when names or shapes are not this model's."""
        own = self.weights()
        if odd := sorted(own.keys() ^ weights.keys()):
            raise CorruptCheckpoint(f"the weights are not this model's: {len(odd)} names differ, first {odd[0]}")
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise CorruptCheckpoint(f"{name} is {tuple(weights[name].shape)}, the model has {tuple(tensor.shape)}")
            tensor.copy_(weights[name])

    def micro_batches(self, batch: Batch, rows: Iterable[int]) -> tuple[Tensor, ...]:
        """Split trajectories into sets whose padded size fits the token budget, longest first; one at the least."""
        longest_first = sorted(rows, key=lambda row: -int(batch.sequence_lengths[row]))
        sets: list[list[int]] = []
        for row in longest_first:
            if sets and (len(sets[-1]) + 1) * int(batch.sequence_lengths[sets[-1][0]]) <= self._micro_batch_tokens:
                sets[-1].append(row)
            else:
                sets.append([row])
        return tuple(torch.tensor(sorted(members)) for members in sets)

    def forward(self, batch: Batch, wanted: frozenset[Column]) -> Forward:
        """Score the whole batch. With several micro-batches only the scores are kept, as leaves of a new graph."""
        sets = self.micro_batches(batch, range(len(batch.keys)))
        if len(sets) == 1:
            scores = _spread(batch, sets, [score(draw(self.model, batch, sets[0]), wanted)])
            return Forward(scores=scores, rows=sets, wanted=wanted)
        with torch.no_grad():
            scores = _spread(batch, sets, [score(draw(self.model, batch, rows), wanted) for rows in sets])
        for leaf in _differentiable(scores):
            leaf.requires_grad_()
        return Forward(scores=scores, rows=sets, wanted=wanted)

    def backward(self, batch: Batch, forward: Forward, loss: Tensor) -> None:
        """Add the gradient of `loss` [] to the parameters: exact, however many micro-batches there are.

        With several, the loss is differentiated to the scores first; then each micro-batch is scored again and takes
        its share of that gradient on to the parameters.
        """
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if len(forward.rows) == 1:
            return
        for rows in forward.rows:
            again = score(draw(self.model, batch, rows), forward.wanted)
            trained = batch.mask[rows].nonzero(as_tuple=True)
            outputs, gradients = [], []
            for leaf, output in zip(_differentiable(forward.scores), _differentiable(again), strict=True):
                if leaf.grad is not None:
                    outputs.append(output)
                    gradients.append(leaf.grad[rows] if leaf.dim() == 1 else leaf.grad[rows][trained])
            torch.autograd.backward(outputs, gradients)


def _differentiable(scores: Scores) -> list[Tensor]:
    return [scores.logprobs, *(scores.columns[column] for column in sorted(_DIFFERENTIABLE & scores.columns.keys()))]


def _spread(batch: Batch, sets: tuple[Tensor, ...], parts: list[Scores]) -> Scores:
    """Put the scores of micro-batches at their places in [B, T] and [B]; 0 behind the mask."""
    logprobs = _spread_tokens(batch, sets, [part.logprobs for part in parts])
    columns = {
        column: (_spread_rows if column in PER_TRAJECTORY else _spread_tokens)(
            batch, sets, [part.columns[column] for part in parts]
        )
        for column in parts[0].columns
    }
    return Scores(logprobs=logprobs, columns=columns)


def _spread_tokens(batch: Batch, sets: tuple[Tensor, ...], parts: list[Tensor]) -> Tensor:
    device = parts[0].device
    places = [batch.mask[rows].nonzero(as_tuple=True) for rows in sets]
    row = torch.cat([rows[where] for rows, (where, _) in zip(sets, places, strict=True)]).to(device)
    time = torch.cat([times for _, times in places]).to(device)
    return torch.zeros(batch.mask.shape, device=device).index_put((row, time), torch.cat(parts))


def _spread_rows(batch: Batch, sets: tuple[Tensor, ...], parts: list[Tensor]) -> Tensor:
    device = parts[0].device
    return torch.zeros(len(batch.keys), device=device).index_put((torch.cat(sets).to(device),), torch.cat(parts))
