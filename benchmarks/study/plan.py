"""Which runs the study consists of, in the order in which they are worth having.

A cell is one method under one lag and reuse. Its learning rate and decay are tuned by successive halving: every rate
with one seed and the first decay, and the next rate beyond for as long as the best one is at an end of the range; the
better half of the rates with the other decay, too; the better half of these with a second seed; the best mean goes
into the final seeds, which tuning never saw. All cells of a part are tuned alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from pydantic import JsonValue

from benchmarks.study.simulation import GRAD_CLIP_NORM, Run
from learner.objectives.recipes import RECIPES

Finals = Callable[[Run], float | None]
"""The final accuracy of a run, None while it was not made."""

LEARNING_RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
RATE_BOUNDS = (5e-5, 6.4e-3)
"""How far tuning may go beyond them, in factors of two."""
LEAN_RATES = (8e-4, 1.6e-3)
"""Where tuning begins in the parts that are tuned with less."""
USUAL_RATE = (8e-4,)
"""Where nothing is tuned: the demo's."""
SCHEDULES: tuple[Literal["constant", "linear"], ...] = ("linear", "constant")
TUNING_SEEDS = (100, 101)
FINAL_SEEDS = (0, 1, 2)
WARMUP_SEEDS = (0, 1)
MAX_LAG = 128
UPDATES = MAX_LAG + 122
"""Of every run of the main table: lag + 120 at the least, the same for all."""

MAIN_METHODS = ("grpo", "tis", "minpro", "trm", "r2vpo", "reval", "tbrm", "stalewise")
TASK_METHODS = ("grpo", "trm", "minpro", "reval", "stalewise")
OPTIONS: dict[str, dict[str, JsonValue]] = {"reval": {"beta": 0.2}, "tbrm": {"beta": 0.2}}
"""Options that are not a recipe's defaults: beta for responses of tens of tokens, as docs/objectives.md advises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A method under one condition; `label` tells variants of a method apart."""

    part: str
    method: str
    label: str
    lag: int = 0
    reuse: int = 1
    task: str = "running_sums"
    updates: int = UPDATES
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    grad_clip_norm: float = GRAD_CLIP_NORM
    learning_rates: Sequence[float] = LEARNING_RATES
    schedules: Sequence[Literal["constant", "linear"]] = SCHEDULES
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    final_seeds: Sequence[int] = FINAL_SEEDS
    warmup_seeds: Sequence[int] = WARMUP_SEEDS

    def lean(self, *, final_seeds: int = len(FINAL_SEEDS)) -> "Cell":
        """Return the cell with less to make: two rates to climb from, one decay, one tuning seed, one checkpoint."""
        return replace(
            self,
            learning_rates=[lr for lr in self.learning_rates if lr in LEAN_RATES],
            schedules=SCHEDULES[:1],
            tuning_seeds=TUNING_SEEDS[:1],
            final_seeds=FINAL_SEEDS[:final_seeds],
            warmup_seeds=WARMUP_SEEDS[:1],
        )

    def run(self, lr: float, schedule: Literal["constant", "linear"], *, warmup_seed: int, seed: int) -> Run:
        """Return one run of the cell."""
        return Run(
            task=self.task,
            objective=self.method,
            options=self.options,
            lag=self.lag,
            reuse=self.reuse,
            updates=self.updates,
            lr=lr,
            schedule=schedule,
            warmup_seed=warmup_seed,
            seed=seed,
            grad_clip_norm=self.grad_clip_norm,
        )

    def candidates(self) -> list[Run]:
        """Return the first rung of tuning."""
        return [
            self.run(lr, self.schedules[0], warmup_seed=self.warmup_seeds[0], seed=self.tuning_seeds[0])
            for lr in self.learning_rates
        ]

    def finals(self, best: Run) -> list[Run]:
        """Return the runs that the tables show."""
        return [
            replace(best, warmup_seed=warmup_seed, seed=seed)
            for seed in self.final_seeds
            for warmup_seed in self.warmup_seeds
        ]


def tuning(cell: Cell, final: Finals) -> tuple[list[Run], Run | None]:
    """Return the tuning runs that can be made now and were not, and the best candidate once there are none."""
    rung, seeds = cell.candidates(), cell.tuning_seeds
    if len(rung) == len(cell.schedules) == 1:
        return [], rung[0]  # nothing to choose
    if missing := _missing(rung, seeds[:1], final):
        return missing, None
    while beyond := _beyond(rung, seeds[0], final):
        if missing := _missing([beyond], seeds[:1], final):
            return missing, None
        rung.append(beyond)
    rates = _better_half(rung, seeds[:1], final)
    rung = [replace(run, schedule=schedule) for run in rates for schedule in cell.schedules]
    for number in range(1, len(seeds) + 1):
        if missing := _missing(rung, seeds[:number], final):
            return missing, None
        rung = _better_half(rung, seeds[:number], final)
    return [], rung[0]


def _beyond(rung: Sequence[Run], seed: int, final: Finals) -> Run | None:
    """Return the run at the next rate, if the best of several is the lowest or the highest, and not at the bounds."""
    rates = sorted(run.lr for run in rung)
    best = _better_half(rung, [seed], final)[0]
    if len(rates) == 1 or best.lr not in (rates[0], rates[-1]):
        return None
    rate = best.lr * (2 if best.lr == rates[-1] else 0.5)
    return replace(best, lr=rate) if RATE_BOUNDS[0] <= rate <= RATE_BOUNDS[1] else None


def _missing(rung: Sequence[Run], seeds: Sequence[int], final: Finals) -> list[Run]:
    runs = [replace(run, seed=seed) for run in rung for seed in seeds]
    return [run for run in runs if final(run) is None]


def _better_half(rung: Sequence[Run], seeds: Sequence[int], final: Finals) -> list[Run]:
    """Return the better half, the best first, by the mean over the seeds, all of which were made."""
    best_first = sorted(rung, key=lambda run: -fmean(final(replace(run, seed=seed)) or 0.0 for seed in seeds))
    return best_first[: max(1, len(rung) // 2)]


def due(cell: Cell, final: Finals) -> list[Run]:
    """Return the runs of a cell that can be made now and were not."""
    missing, best = tuning(cell, final)
    return missing if best is None else [run for run in cell.finals(best) if final(run) is None]


def cells() -> Iterator[Cell]:
    """Return every cell of the study, the most telling first."""
    yield from main_cells()
    yield from ablation_cells()
    yield from task_cells()
    yield from other_cells()
    yield from long_cells()
    yield from clip_cells()


def main_cells() -> Iterator[Cell]:
    """The main table: eight methods, three lags, two reuses."""
    conditions = ((128, 1), (0, 1), (0, 4), (32, 1), (0, 8))
    for lag, reuse in conditions:
        for method in MAIN_METHODS:
            yield Cell(part="main", method=method, label=method, lag=lag, reuse=reuse, options=OPTIONS.get(method, {}))


ABLATIONS: dict[str, dict[str, JsonValue]] = {
    "as shipped": {},
    "no taper": {"taper": False},
    "no taper, leave-one-out (the default before the study)": {"taper": False, "advantage": "leave_one_out"},
    "leave-one-out": {"advantage": "leave_one_out"},
    "no prefix factor": {"weight": "token"},
    "no ratio": {"weight": "none"},
    "prefix capped at 1": {"weight": "minpro_capped"},
    "no gate": {"max_k2": "inf"},
    "gate at 0.05": {"max_k2": 0.05},
    "gate at 2": {"max_k2": 2.0},
    "constraint, lambda_max 0.03": {"lambda_max": 0.03},
    "constraint, lambda_max 0.1": {"lambda_max": 0.1},
    "constraint, lambda_max 0.3": {"lambda_max": 0.3},
    "residual 0.1": {"bellman_coefficient": 0.1},
    "residual 0.3": {"bellman_coefficient": 0.3},
    "residual 1": {"bellman_coefficient": 1.0},
    "residual alone": {"policy_coefficient": 0.0, "bellman_coefficient": 1.0, "lambda_max": 0.0},
}


def ablation_cells() -> Iterator[Cell]:
    """`stalewise` with one part changed, at lag 128."""
    for label, options in ABLATIONS.items():
        yield Cell(part="ablations", method="stalewise", label=label, lag=MAX_LAG, options=options).lean()


def task_cells() -> Iterator[Cell]:
    """Two more tasks, with answers of 17 and 25 tokens."""
    for lag in (MAX_LAG, 0):
        for task in ("sorting", "scratchpad_addition"):
            for method in TASK_METHODS:
                options = OPTIONS.get(method, {})
                yield Cell(part="tasks", method=method, label=method, lag=lag, task=task, options=options).lean()


def other_cells() -> Iterator[Cell]:
    """Every other recipe, one seed at lag 128."""
    for method in RECIPES:
        if method not in MAIN_METHODS:
            yield Cell(part="others", method=method, label=method, lag=MAX_LAG).lean(final_seeds=1)


def long_cells() -> Iterator[Cell]:
    """Lag 512, one seed, at the rate that is usual here."""
    for method in ("stalewise", "grpo"):
        cell = Cell(part="lag 512", method=method, label=method, lag=512, updates=512 + 122, learning_rates=USUAL_RATE)
        yield cell.lean(final_seeds=1)


CLIPPED: tuple[tuple[str, int, dict[str, float]], ...] = (
    ("running_sums", 0, {"grpo": 3.2e-3, "minpro": 3.2e-3, "stalewise": 3.2e-3}),
    ("sorting", MAX_LAG, {"grpo": 8e-4, "minpro": 4e-4, "stalewise": 8e-4, "trm": 4e-4}),
    ("scratchpad_addition", MAX_LAG, {"grpo": 8e-4, "minpro": 1.6e-3, "stalewise": 1.6e-3, "trm": 8e-4}),
    ("scratchpad_addition", 0, {"grpo": 1.6e-3, "minpro": 1.6e-3, "stalewise": 1.6e-3}),
)
"""Task, lag, and the rate that each method was tuned to there with the usual clip, linear to 0."""

HARDER_CLIP, NO_CLIP = 0.1, 1e9


def clip_cells() -> Iterator[Cell]:
    """The same rates with another clip: harder for means over tokens, off for `trm`, whose sums the usual one cuts."""
    for task, lag, rates in CLIPPED:
        for method, lr in rates.items():
            cell = Cell(
                part="clip",
                method=method,
                label=method,
                lag=lag,
                task=task,
                grad_clip_norm=NO_CLIP if method == "trm" else HARDER_CLIP,
                learning_rates=(lr,),
                schedules=SCHEDULES[:1],
                warmup_seeds=WARMUP_SEEDS if task == "running_sums" else WARMUP_SEEDS[:1],
            )
            yield cell


def quick_cells() -> Iterator[Cell]:
    """A few short runs that take every path of the study in minutes; their numbers mean nothing."""
    for method in ("grpo", "stalewise"):
        for lag in (0, 4):
            cell = Cell(part="main", method=method, label=method, lag=lag, updates=20, learning_rates=USUAL_RATE)
            yield cell.lean(final_seeds=1)
