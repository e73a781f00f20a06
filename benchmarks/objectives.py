"""Forward and backward of every policy-gradient recipe on [256 x 4096] tokens, against the plain GRPO loss.

The plain loss is PPO's clip written out, on the same tensors in the same run. One thread, its CPU time, medians. A copy
of one tensor gives the memory bandwidth, and so the floor under any loss.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.objectives [--rows 256] [--tokens 4096] [--repeats 5] [RECIPE ...]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from learner.objectives.composition import Composition, SquaredResidual
from learner.objectives.recipes import RECIPES, build_objective
from learner.tokens import PER_TRAJECTORY, Column, Tokens

GROUP_SIZE = 8
GOAL = 1.5
VARIANTS: dict[str, dict[str, object]] = {
    "stalewise + constraint": {"lambda_max": 0.1},
    "stalewise + residual": {"bellman_coefficient": 1.0},
    "stalewise + both": {"lambda_max": 0.1, "bellman_coefficient": 1.0},
}
"""What the parts that are off by default would cost."""
FLOOR_READS = 3
"""Log-probs and behaviour log-probs forward, and one of them backward; the gradient is written. Masks are bytes."""


def make_tokens(rows: int, tokens: int) -> Tokens:
    """Ragged rows, log-ratios of a few per cent, every column; those of the forward pass need a gradient."""
    generator = torch.Generator().manual_seed(0)
    behavior = -torch.rand(rows, tokens, generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    logprobs = behavior + 0.05 * torch.randn(rows, tokens, generator=generator)
    return Tokens(
        logprobs=logprobs.requires_grad_(),
        behavior_logprobs=behavior,
        mask=mask,
        rewards=torch.rand(rows, generator=generator).round(),
        group=torch.arange(rows) // GROUP_SIZE,
        episode=torch.arange(rows),
        age_updates=torch.where(mask, torch.arange(rows)[:, None] % 20, -1),
        columns={column: torch.zeros(rows) if column in PER_TRAJECTORY else behavior.clone() for column in Column}
        | {
            Column.UNIT_LOGPROBS: logprobs.detach().clone().requires_grad_(),
            Column.FIRST_LOGIT: torch.zeros(rows, requires_grad=True),
        },
    )


def plain_grpo(tokens: Tokens, advantage: Tensor) -> Tensor:
    """PPO's clip and a mean over sequences of means, as one would write it down; no masks of garbage, no metrics."""
    ratio = (tokens.logprobs - tokens.behavior_logprobs).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -((surrogate * tokens.mask).sum(-1) / tokens.mask.sum(-1)).mean()


def step_s(loss: Callable[[], Tensor], leaf: Tensor) -> float:
    """Seconds of one forward and backward."""
    leaf.grad = None
    return seconds(lambda: loss().backward())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread: what the machine does besides is not counted."""
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def compare(name: str, tokens: Tokens, repeats: int) -> str:
    """One row of the table. Both losses take turns, so that what disturbs one disturbs the other."""
    advantage = tokens.rewards[:, None] - 0.5
    objective = build_objective(name.split(" ")[0], VARIANTS.get(name, {}))
    multipliers = objective.initial_multipliers()
    pairs_s = [
        (
            step_s(lambda: plain_grpo(tokens, advantage), tokens.logprobs),
            step_s(lambda: objective(replace(tokens), multipliers).total, tokens.logprobs),  # nothing known yet
        )
        for _ in range(repeats + 1)  # the first warms up
    ]
    plain_s, ours_s = (statistics.median(times_s) for times_s in zip(*pairs_s[1:], strict=True))
    verdict = "" if ours_s <= GOAL * plain_s else f"  above {GOAL}"
    return f"{name:<22}{1e3 * ours_s:>8.1f}{1e3 * plain_s:>10.1f}{ours_s / plain_s:>7.2f}{verdict}"


def is_policy_gradient(name: str) -> bool:
    objective = build_objective(name, {})
    assert isinstance(objective, Composition)
    return not all(isinstance(term, SquaredResidual) for term in objective.terms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; default all policy-gradient recipes")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = make_tokens(arguments.rows, arguments.tokens)
    source, target = tokens.behavior_logprobs, torch.empty_like(tokens.behavior_logprobs)
    copied_s = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(20))
    bandwidth = 2 * source.nbytes / copied_s / 1e9
    print(f"[{arguments.rows} x {arguments.tokens}] float32, torch {torch.__version__}, 1 thread, medians")
    print(f"copy of one tensor: {1e3 * copied_s:.2f} ms = {bandwidth:.1f} GB/s read and written")
    print(
        f"floor of a loss that reads {FLOOR_READS} tensors, writes 1: {1e3 * copied_s * (FLOOR_READS + 1) / 2:.2f} ms"
    )
    print(f"{'recipe':<22}{'ms':>8}{'plain ms':>10}{'ratio':>7}")
    for name in arguments.recipes or [*VARIANTS, *filter(is_policy_gradient, RECIPES)]:
        print(compare(name, tokens, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
