"""Small batches made by hand, as plain rows and as tensors."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.objectives.objective import Objective
from learner.objectives.recipes import build_objective
from learner.tokens import Column, Tokens, cleaned

NAN = math.nan
TOKEN_COLUMNS = frozenset(
    {
        Column.UNIT_LOGPROBS,
        Column.REFERENCE_LOGPROBS,
        Column.PROXIMAL_LOGPROBS,
        Column.ENTROPY,
        Column.OTHER_SQUARED_PROBS,
        Column.EXACT_KL,
        Column.EXACT_TV,
        Column.KL_LOWER_BOUND,
    }
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trajectory: what the plain loops read. Lists over response positions, holes included."""

    log_ratios: list[float]
    """log pi - log behavior; the log-probs follow from them."""
    mask: list[int]
    reward: float
    group: int
    episode: int
    ages: list[int]
    first_logit: float = 0.3
    reference_first_logit: float = 0.1
    behavior: list[float] = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.log_ratios) == len(self.mask) == len(self.ages)
        object.__setattr__(self, "behavior", [-0.4 - 0.3 * (t % 3) for t in range(len(self.mask))])

    @property
    def logprobs(self) -> list[float]:
        return [b + log for b, log in zip(self.behavior, self.log_ratios, strict=True)]

    @property
    def unit(self) -> list[float]:
        return [0.8 * p - 0.05 for p in self.logprobs]

    @property
    def reference(self) -> list[float]:
        return [0.7 * b - 0.1 * t for t, b in enumerate(self.behavior)]

    @property
    def proximal(self) -> list[float]:
        return [p - 0.1 + 0.05 * (t % 4) for t, p in enumerate(self.logprobs)]

    @property
    def entropy(self) -> list[float]:
        return [0.2 + 0.1 * t for t in range(len(self.mask))]

    @property
    def other_squares(self) -> list[float]:
        """Sum of the squared probabilities of the tokens that were not drawn."""
        return [0.02 + 0.03 * (t % 3) for t in range(len(self.mask))]

    @property
    def exact_kl(self) -> list[float]:
        """Not the sampled k2: it sees the tokens that were not drawn."""
        return [0.01 * (t % 4) + 0.3 * min(abs(log), 5.0) for t, log in enumerate(self.log_ratios)]

    @property
    def exact_tv(self) -> list[float]:
        return [min(math.sqrt(kl / 3), 1.0) for kl in self.exact_kl]

    @property
    def kl_lower_bound(self) -> list[float]:
        return [0.6 * kl for kl in self.exact_kl]

    @property
    def trained(self) -> list[int]:
        return [t for t, m in enumerate(self.mask) if m]


ROWS = (
    # a group of three: two versions in one response, a hole, a masked first position, one wild ratio
    Row(log_ratios=[0.02, -0.3, 0.1, 0.25, -0.05], mask=[1, 1, 1, 1, 1], reward=1.0, group=0, episode=0, ages=[7] * 5),
    Row(log_ratios=[0.4, -0.7, 9.0, 0.15], mask=[1, 1, 0, 1], reward=0.0, group=0, episode=1, ages=[3, 3, -1, 2]),
    Row(
        log_ratios=[5.0, 0.05, -0.02, 0.03, 0.01, 0.02],
        mask=[0, 1, 1, 1, 1, 1],
        reward=0.5,
        group=0,
        episode=2,
        ages=[0] * 6,
    ),
    # a group of four trajectories and three episodes: the two last share one
    Row(log_ratios=[-2.5, 0.3, 0.2], mask=[1, 1, 1], reward=1.0, group=1, episode=3, ages=[20] * 3),
    Row(log_ratios=[1.4], mask=[1], reward=0.0, group=1, episode=4, ages=[20]),
    Row(log_ratios=[0.01, 0.02], mask=[1, 1], reward=0.25, group=1, episode=5, ages=[-1, -1]),
    Row(log_ratios=[-0.06, -0.04, 0.08], mask=[1, 0, 1], reward=0.25, group=1, episode=5, ages=[100] * 3),
    # a group of one
    Row(log_ratios=[0.1, -0.2, 0.35], mask=[1, 1, 1], reward=1.0, group=2, episode=6, ages=[1] * 3, first_logit=-0.6),
)

ALL_PARTS: dict[str, object] = {"lambda_max": 0.1, "bellman_coefficient": 1.0}
"""Of stalewise, whose constraint and residual are off by default."""


def whole(name: str) -> Objective:
    """The recipe of that name by its defaults, with all its parts."""
    return build_objective(name, ALL_PARTS if name == "stalewise" else {})


def padded(lists: list[list[float]], fill: float) -> Tensor:
    """[B, T] float32, `fill` behind the end of each list."""
    width = max(len(values) for values in lists)
    return torch.tensor([values + [fill] * (width - len(values)) for values in lists])


def tokens_of(
    rows: tuple[Row, ...] = ROWS,
    *,
    behind_mask: float = NAN,
    dtype: torch.dtype = torch.float32,
    on_policy: bool = False,
) -> Tokens:
    """The rows as tensors, every column filled; what is differentiable is a leaf."""
    mask = padded([[float(m) for m in row.mask] for row in rows], 0.0).bool()

    def numbered(names: list[int]) -> Tensor:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    def column(lists: list[list[float]]) -> Tensor:
        return padded(lists, 0.0).masked_fill(~mask, behind_mask).to(dtype)

    def divergence(lists: list[list[float]]) -> Tensor:
        return column([[0.0] * len(values) for values in lists] if on_policy else lists)

    behavior = column([row.behavior for row in rows])
    return Tokens(
        logprobs=(behavior.clone() if on_policy else column([row.logprobs for row in rows])).requires_grad_(),
        behavior_logprobs=behavior,
        mask=mask,
        rewards=torch.tensor([row.reward for row in rows]),
        group=numbered([row.group for row in rows]),
        episode=numbered([row.episode for row in rows]),
        age_updates=padded([[float(a) for a in row.ages] for row in rows], -1.0).long(),
        columns={
            Column.UNIT_LOGPROBS: column([row.unit for row in rows]).requires_grad_(),
            Column.REFERENCE_LOGPROBS: column([row.reference for row in rows]),
            Column.PROXIMAL_LOGPROBS: behavior.clone() if on_policy else column([row.proximal for row in rows]),
            Column.ENTROPY: column([row.entropy for row in rows]),
            Column.OTHER_SQUARED_PROBS: column([row.other_squares for row in rows]),
            Column.EXACT_KL: divergence([row.exact_kl for row in rows]),
            Column.EXACT_TV: divergence([row.exact_tv for row in rows]),
            Column.KL_LOWER_BOUND: divergence([row.kl_lower_bound for row in rows]),
            Column.FIRST_LOGIT: torch.tensor([row.first_logit for row in rows], dtype=dtype).requires_grad_(),
            Column.REFERENCE_FIRST_LOGIT: torch.tensor([row.reference_first_logit for row in rows], dtype=dtype),
        },
    )


def one_batch(
    *,
    policy: list[list[float]],
    behavior: list[list[float]],
    rewards: list[float],
    mask: list[list[int]] | None = None,
    group: list[int] | None = None,
) -> Tokens:
    """A batch from probabilities, padded with ragged ends masked; by default every row is a group of one."""
    count = len(policy)
    trained = padded([[float(m) for m in row] for row in (mask or [[1] * len(row) for row in policy])], 0.0).bool()
    return Tokens(
        logprobs=padded(policy, 1.0).double().log().float().requires_grad_(),
        behavior_logprobs=padded(behavior, 1.0).double().log().float(),
        mask=trained,
        rewards=torch.tensor(rewards),
        group=torch.tensor(group or range(count)),
        episode=torch.arange(count),
        age_updates=torch.zeros(trained.shape, dtype=torch.int64),
    )


def from_logs(rows: list[list[float]], mask: list[list[int]] | None = None) -> Tokens:
    """A batch with these log-ratios."""
    tokens = one_batch(
        policy=[[1.0] * len(row) for row in rows],
        behavior=[[math.exp(-log) for log in row] for row in rows],
        rewards=[1.0] * len(rows),
        mask=mask,
    )
    return cleaned(tokens, ())


def gradient(total: Tensor, leaf: Tensor) -> Tensor:
    """d total / d leaf, 0 where the loss does not depend on it."""
    (grad,) = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=True)
    return torch.zeros_like(leaf) if grad is None else grad
