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
from buffer.weights.manifest import Adapter
from learner.attention import PACKED_ATTENTION
from learner.collate import Batch
from learner.errors import CorruptCheckpoint
from learner.packing import join, pack
from learner.scorer import Scorer, attention_name, check_scores, compile_layers, prepare_layers
from learner.scoring import CHOSEN_LOGIT, DIFFERENTIABLE, LOGPROBS, targets
from learner.settings import ComputeSettings
from learner.tokens import DIVERGENCES, Column

FLOAT32 = ComputeSettings()
"""The defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the policy says about a batch, 0 behind the mask."""

    logprobs: Tensor
    """[B, T] under the stored sampling settings."""
    columns: dict[Column, Tensor]
    """[B, T]; `first_logit` is [B]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """The policy's scores of a whole batch, as leaves that a loss leaves its gradient on."""

    scores: Scores
    rows: tuple[Tensor, ...]  # the micro-batches: trajectory numbers
    live: dict[str, Tensor]  # scores [n] of the last micro-batch, with their graph


class Policy:
    """A causal LM whose weights one optimiser moves. Always in evaluation mode: dropout would falsify every ratio."""

    adapter: Adapter | None = None
    """What the weights mean when they are an adapter's (learner.lora); None = they are all of the model's."""

    def __init__(self, model: PreTrainedModel, *, micro_batch_tokens: int, compute: ComputeSettings = FLOAT32) -> None:
        self.model = model.eval()
        self.scorer = Scorer(model, compute)
        """The forward pass: what a wrapper of modules (sharding) must wrap."""
        self.micro_batch_tokens = micro_batch_tokens
        self.compute = compute

    @classmethod
    def load(cls, model_dir: Path, *, device: str, micro_batch_tokens: int, compute: ComputeSettings = FLOAT32) -> Self:
        """Load float32 weights from a local directory of safetensors files. Raises InvalidSettings."""
        attention = attention_name(compute)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=PACKED_ATTENTION,
            )
        except (OSError, ValueError) as error:
            raise InvalidSettings(f"{model_dir} does not hold a causal language model: {error}") from error
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it was not built for
            raise InvalidSettings(f"learner.device={device!r} cannot be used: {error}") from error
        check_scores(model.eval())
        model.set_attn_implementation(attention)
        prepare_layers(model, compute)
        return cls(model, micro_batch_tokens=micro_batch_tokens, compute=compute)

    @property
    def vocab_size(self) -> int:
        """Token ids must be below it."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def max_positions(self) -> int:
        """Tokens of a sequence that the model was made for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def frozen_copy(self) -> "Policy":
        """Return a copy without gradients: a reference."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        if self.compute.compile:  # a copy of a module has no compiled call
            compile_layers(model)
        return Policy(model, micro_batch_tokens=self.micro_batch_tokens, compute=self.compute)

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
        """Split trajectories into sets of at most `micro_batch_tokens` tokens; a longer one is a set of its own."""
        rows = list(rows)
        bins = pack([int(batch.sequence_lengths[row]) for row in rows], self.micro_batch_tokens)
        return tuple(torch.tensor(sorted(rows[index] for index in members)) for members in bins)

    def forward(self, batch: Batch, wanted: frozenset[Column]) -> Forward:
        """Score the whole batch. The graph of the last micro-batch is kept; the others are scored again in `backward`.

        The scores are leaves of a new graph, to which `backward` wants the gradient of a loss.
        """
        sets = self.micro_batches(batch, range(len(batch.keys)))
        with torch.no_grad():
            parts = [self._score(batch, rows, wanted) for rows in sets[:-1]]
        live = self._score(batch, sets[-1], wanted)
        scores = spread(batch, sets, [*parts, live], wanted)
        for leaf in differentiable(scores).values():
            leaf.requires_grad_()
        return Forward(scores=scores, rows=sets, live=live)

    def backward(self, batch: Batch, forward: Forward, loss: Tensor, *, row_weights: Tensor | None = None) -> None:
        """Add the gradient of `loss` [] to the parameters: exact, however many micro-batches there are.

        `row_weights` [B] scale the share of each trajectory: exact for a loss that is a sum over groups.

        The loss is differentiated to the scores first; then each micro-batch takes its share on to the parameters.
        Trajectories whose scores have no gradient (all gated, or no advantage) are not run again.
        """
        gradients = score_gradients(forward.scores, loss, row_weights)
        last = of_tokens(batch, forward.rows[-1], gradients)
        torch.autograd.backward([forward.live[name] for name in last], list(last.values()))
        moving = moving_rows(batch, gradients)
        moving[forward.rows[-1]] = False
        for rows in self.micro_batches(batch, moving.nonzero()[:, 0].tolist()):
            self._descend(batch, rows, of_tokens(batch, rows, gradients))

    @torch.no_grad()
    def unit_scores(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi [n] at temperature 1 of the trained tokens of `rows` [b], and the first raw logit of each."""
        drawn = targets(batch, rows, with_distributions=False, device=self.model.device).at_unit_temperature()
        of_tokens = self.scorer(join(batch, rows), drawn, frozenset({Column.FIRST_LOGIT}))
        return of_tokens[LOGPROBS], of_tokens[CHOSEN_LOGIT][starts(batch, rows).to(self.model.device)]

    @torch.no_grad()
    def probe_logits(self, token_ids: Tensor) -> Tensor:
        """Return transformers' own logits [1, S, V] of one sequence [1, S] int64, float32: what an engine computes."""
        return self.scorer.logits(token_ids)

    def _descend(self, batch: Batch, rows: Tensor, gradients: dict[str, Tensor]) -> None:
        """Score `rows` again and take the known gradients [n] of their scores on to the parameters."""
        self._run(batch, rows, frozenset(), gradients=gradients)["descent"].backward()  # type: ignore[no-untyped-call]

    def _score(self, batch: Batch, rows: Tensor, wanted: frozenset[Column]) -> dict[str, Tensor]:
        return self._run(batch, rows, wanted, gradients=None)

    def _run(
        self, batch: Batch, rows: Tensor, wanted: frozenset[Column], *, gradients: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        drawn = targets(batch, rows, with_distributions=bool(wanted & DIVERGENCES), device=self.model.device)
        result: dict[str, Tensor] = self.scorer(join(batch, rows), drawn, wanted, gradients)
        return result


def score_gradients(scores: Scores, loss: Tensor, row_weights: Tensor | None) -> dict[str, Tensor]:
    """Differentiate a loss to the leaves that scores are; the rows [B] of the gradients are scaled by their weights."""
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradients = {name: leaf.grad for name, leaf in differentiable(scores).items() if leaf.grad is not None}
    if row_weights is not None:
        for of_scores in gradients.values():
            weights = row_weights.to(of_scores.device)
            of_scores *= weights if of_scores.dim() == 1 else weights[:, None]
    return gradients


def moving_rows(batch: Batch, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return which trajectories [B] bool have a score with a gradient."""
    moving = torch.zeros(len(batch.keys), dtype=torch.bool)
    for of_scores in gradients.values():
        moving |= (of_scores.flatten(1) != 0).any(-1).cpu() if of_scores.dim() == 2 else (of_scores != 0).cpu()
    return moving


def differentiable(scores: Scores) -> dict[str, Tensor]:
    """The leaves, by the name that the scorer gives them."""
    found = {LOGPROBS: scores.logprobs}
    found |= {column.value: value for column, value in scores.columns.items() if column in DIFFERENTIABLE}
    if Column.FIRST_LOGIT in scores.columns:
        found[CHOSEN_LOGIT] = scores.columns[Column.FIRST_LOGIT]
    return found


def spread(batch: Batch, sets: tuple[Tensor, ...], parts: list[dict[str, Tensor]], wanted: frozenset[Column]) -> Scores:
    """Put the scores of micro-batches at their places in [B, T] and [B], without a graph; 0 behind the mask."""
    places = [batch.mask[rows].nonzero(as_tuple=True) for rows in sets]
    row = torch.cat([rows[where] for rows, (where, _) in zip(sets, places, strict=True)])
    time = torch.cat([times for _, times in places])
    spread = {}
    for name in parts[0].keys() - {CHOSEN_LOGIT}:
        values = torch.cat([part[name].detach() for part in parts])
        place = (row.to(values.device), time.to(values.device))
        spread[name] = torch.zeros(batch.mask.shape, device=values.device).index_put(place, values)
    columns = {Column(name): value for name, value in spread.items() if name != LOGPROBS}
    if Column.FIRST_LOGIT in wanted:
        firsts = [part[CHOSEN_LOGIT].detach()[starts(batch, rows)] for rows, part in zip(sets, parts, strict=True)]
        values = torch.cat(firsts)
        place_of_row = (torch.cat(sets).to(values.device),)
        columns[Column.FIRST_LOGIT] = torch.zeros(len(batch.keys), device=values.device).index_put(place_of_row, values)
    if Column.PROXIMAL_LOGPROBS in wanted:
        columns[Column.PROXIMAL_LOGPROBS] = spread[LOGPROBS].clone()  # one step a batch: the policy before it
    return Scores(logprobs=spread[LOGPROBS], columns=columns)


def of_tokens(batch: Batch, rows: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients [n] of the trained tokens of `rows` [b], of gradients [B, T] and [B]."""
    trained = batch.mask[rows].nonzero(as_tuple=True)
    found = {}
    for name, of_scores in gradients.items():
        of_rows = of_scores[rows.to(of_scores.device)]
        if name == CHOSEN_LOGIT:
            found[name] = torch.zeros(len(trained[0]), device=of_rows.device)
            found[name][starts(batch, rows).to(of_rows.device)] = of_rows
        else:
            found[name] = of_rows[trained[0].to(of_rows.device), trained[1].to(of_rows.device)]
    return found


def starts(batch: Batch, rows: Tensor) -> Tensor:
    """[b]: where among the trained tokens of `rows` each row begins."""
    lengths = batch.mask[rows].sum(-1)
    return lengths.cumsum(0) - lengths
