"""A policy split over ranks with FSDP2: each holds a part of every weight, and runs its share of a batch.

Every rank has the whole batch and, after the forward pass, everybody's scores: the loss, its denominators, the metrics
and the multipliers are computed on all ranks from the same numbers, and only the model's work is divided.

Legend: B trajectories, T response positions, n trained tokens of some rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.collate import Batch
from learner.distributed import Ranks
from learner.packing import pack
from learner.policy import Forward, Policy, Scores, differentiable, moving_rows, of_tokens, score_gradients, spread
from learner.tokens import Column


class _Share(NamedTuple):
    """The micro-batches of this rank, as many as everybody's: a collective that one rank does not join hangs all."""

    rows: tuple[Tensor, ...]
    real: tuple[bool, ...]  # False: there was none left, and another rank's trajectory stands in, to no effect

    @property
    def own(self) -> list[int]:
        return [row for rows, real in zip(self.rows, self.real, strict=True) if real for row in rows.tolist()]


class ShardedPolicy(Policy):
    """One rank's part of a policy. All ranks make every call, with equal arguments."""

    def __init__(self, load: Callable[[], Policy], *, ranks: Ranks) -> None:
        """Load a whole policy and keep a part of it; `load` is called again for each frozen copy."""
        policy = load()
        super().__init__(policy.model, micro_batch_tokens=policy.micro_batch_tokens, compute=policy.compute)
        self._load = load
        self._ranks = ranks
        mesh = init_device_mesh(policy.model.device.type, (ranks.size,))
        for module in policy.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, mesh=mesh)
        self._root = fully_shard(self.scorer, mesh=mesh)
        register_fsdp_forward_method(self.scorer, "logits")

    def frozen_copy(self) -> Policy:
        """Return a copy without gradients, split in the same way."""
        copied = ShardedPolicy(self._load, ranks=self._ranks)
        copied.load_weights(self.weights())
        copied.model.requires_grad_(False)
        return copied

    def forward(self, batch: Batch, wanted: frozenset[Column]) -> Forward:
        """See Policy: each rank scores its share, and all get all scores."""
        share = self._share(batch, range(len(batch.keys)))
        with torch.no_grad():
            parts = [self._score(batch, rows, wanted) for rows in share.rows[:-1]]
        live = self._score(batch, share.rows[-1], wanted)
        scores = self._joined(spread(batch, share.rows, [*parts, live], wanted), share.own)
        for leaf in differentiable(scores).values():
            leaf.requires_grad_()
        return Forward(scores=scores, rows=share.rows, live=live)

    def backward(self, batch: Batch, forward: Forward, loss: Tensor, *, row_weights: Tensor | None = None) -> None:
        """See Policy: each rank takes the gradient of its share on; FSDP2 adds them up."""
        gradients = score_gradients(forward.scores, loss, row_weights)
        for of_scores in gradients.values():
            of_scores *= self._ranks.size  # FSDP2 averages over ranks
        bins = self._bins(batch, range(len(batch.keys)))
        live = [row for members in bins[-self._ranks.size :] for row in members]
        last = self._of_own(batch, forward.rows[-1], gradients, real=bool(bins[self._ranks.rank - self._ranks.size]))
        torch.autograd.backward([forward.live[name] for name in last], list(last.values()))
        moving = self._ranks.sum(moving_rows(batch, gradients).int()) > 0  # one list, whatever a rank's rounding says
        moving[live] = False
        left = moving.nonzero()[:, 0].tolist()
        if left:
            share = self._share(batch, left)
            for rows, real in zip(share.rows, share.real, strict=True):
                self._descend(batch, rows, self._of_own(batch, rows, gradients, real=real))

    @torch.no_grad()
    def unit_scores(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See Policy: each rank scores some of the rows, and all get all scores."""
        own = rows[self._ranks.rank :: self._ranks.size]
        logprobs_of_own, firsts_of_own = super().unit_scores(batch, own if len(own) else rows[:1])
        self._root.reshard()  # no backward pass follows that would drop the whole weights
        logprobs = torch.zeros(int(batch.mask[rows].sum()), device=logprobs_of_own.device)
        firsts = torch.zeros(len(rows), device=firsts_of_own.device)
        if len(own):
            mine = torch.zeros(len(rows), dtype=torch.bool)
            mine[self._ranks.rank :: self._ranks.size] = True
            logprobs[mine.repeat_interleave(batch.mask[rows].sum(-1)).to(logprobs.device)] = logprobs_of_own
            firsts[mine.to(firsts.device)] = firsts_of_own
        return self._ranks.sum(logprobs), self._ranks.sum(firsts)

    @torch.no_grad()
    def probe_logits(self, token_ids: Tensor) -> Tensor:
        """See Policy: each rank computes the same."""
        logits = super().probe_logits(token_ids)
        self._root.reshard()
        return logits

    def _bins(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """Return micro-batches, the same list on all ranks: rank r runs r, r + size, and so on, as many as each."""
        lengths = [int(batch.sequence_lengths[row]) for row in rows]
        bins = pack(lengths, self.micro_batch_tokens, num_ranks=self._ranks.size)
        return [sorted(rows[index] for index in members) for members in bins]

    def _share(self, batch: Batch, rows: Sequence[int]) -> _Share:
        own = self._bins(batch, rows)[self._ranks.rank :: self._ranks.size]
        stand_in = [min(rows, key=lambda row: int(batch.sequence_lengths[row]))]
        return _Share(tuple(torch.tensor(members or stand_in) for members in own), tuple(bool(bin_) for bin_ in own))

    def _joined(self, scores: Scores, own: Sequence[int]) -> Scores:
        """Put the scores [B, T] and [B] of all ranks together."""
        mine = torch.zeros(len(scores.logprobs), dtype=torch.bool, device=scores.logprobs.device)
        mine[own] = True

        def of_all(values: Tensor) -> Tensor:
            return self._ranks.sum(torch.where(mine if values.dim() == 1 else mine[:, None], values, 0.0))

        columns = {column: of_all(scores.columns[column]) for column in sorted(scores.columns)}
        return Scores(logprobs=of_all(scores.logprobs), columns=columns)

    def _of_own(self, batch: Batch, rows: Tensor, gradients: dict[str, Tensor], *, real: bool) -> dict[str, Tensor]:
        """Return the gradients [n] of the trained tokens of `rows`: 0 for a stand-in."""
        found = of_tokens(batch, rows, gradients)
        return found if real else {name: torch.zeros_like(values) for name, values in found.items()}
