"""Fills the tables and plots of docs/staleness.md from the results; the words between them are written by hand.

A block stands between `<!-- results: NAME -->` and `<!-- /results -->`; each function of BLOCKS writes one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.plan import RATE_BOUNDS, SCHEDULES, Cell, tuning
from benchmarks.study.results import Results
from benchmarks.study.simulation import Point, Run

NOT_YET = "-"
RATES = tuple(RATE_BOUNDS[0] * 2**doublings for doublings in range(8))
"""All that tuning can ask for."""
LAGS, CURVES = "staleness-lags.png", "staleness-curves.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a cell: its tuned setting and its final runs so far."""

    cell: Cell
    best: Run | None
    finals: list[float]
    curves: list[list[Point]]
    failures: list[str]
    skipped: list[int]
    """Updates that each final run skipped."""
    metrics: list[dict[str, float]]
    tried: dict[tuple[str, float], float]
    """Final accuracy by decay and rate, with the first seed of tuning."""

    @property
    def accepted(self) -> str:
        """The share of sequences that the gates kept, by gate; the median over the final runs."""
        names = sorted(
            {name for metrics in self.metrics for name in metrics if name.startswith("gate/") and "_age_" not in name}
        )
        shares = [median(metrics[name] for metrics in self.metrics if name in metrics) for name in names]
        return ", ".join(f"{100 * share:.0f} %" for share in shares) or NOT_YET

    @property
    def median(self) -> float | None:
        return median(self.finals) if self.finals else None

    @property
    def spread(self) -> str:
        """`median (lowest to highest, number of runs)`, in per cent."""
        if not self.finals:
            return NOT_YET
        middle, low, high = (100 * x for x in (median(self.finals), min(self.finals), max(self.finals)))
        return f"{middle:.1f} ({low:.1f} to {high:.1f}, {len(self.finals)})"

    @property
    def deepest_dip(self) -> float | None:
        """The largest fall of a final run's accuracy below an earlier evaluation, in the second half of the run."""
        dips = [_late_dip(curve) for curve in self.curves]
        return max(dips) if dips else None


def write_report(results: Results, cells: Sequence[Cell], path: Path) -> None:
    """Rewrite the blocks of the page at `path`, and the plots beside it in images/."""
    outcomes = [_outcome(cell, results) for cell in cells]
    text = path.read_text()
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- /results -->)"
        text, count = re.subn(pattern, lambda found: found[1] + block(outcomes) + "\n" + found[2], text, flags=re.S)  # noqa: B023
        assert count == 1, f"{path} has {count} blocks {name}"
    path.write_text(text)
    if _of_main_with_finals(outcomes):
        images = path.parent / "images"
        images.mkdir(exist_ok=True)
        _plot_curves(outcomes, images / CURVES)
        _plot_lags(outcomes, images / LAGS)


def _outcome(cell: Cell, results: Results) -> Outcome:
    _, best = tuning(cell, results.final)
    records = [r for run in (cell.finals(best) if best else []) if (r := results.record(run)) is not None]
    found = [record["result"] for record in records]
    return Outcome(
        cell=cell,
        best=best,
        finals=[float(result["final"]) for result in found],
        curves=[[(int(u), int(r), float(a)) for u, r, a in result["curve"]] for result in found],
        failures=[result["failure"] for result in found if result["failure"]],
        skipped=[int(result["skipped"]) for result in found],
        metrics=[result["metrics"] for result in found],
        tried={
            (schedule, lr): final
            for schedule in SCHEDULES
            for lr in RATES
            if (final := results.final(replace(cell.candidates()[0], lr=lr, schedule=schedule))) is not None
        },
    )


def _late_dip(curve: Sequence[Point]) -> float:
    return _deepest_fall(curve, first=max(1, len(curve) // 2))


def _deepest_fall(curve: Sequence[Point], *, first: int = 1) -> float:
    """The largest fall below an earlier evaluation, of the evaluations from the `first` on."""
    accuracies = [accuracy for _, _, accuracy in curve]
    return max((max(accuracies[:i]) - accuracies[i] for i in range(first, len(accuracies))), default=0.0)


def _of(outcomes: Sequence[Outcome], **wanted: object) -> list[Outcome]:
    return [o for o in outcomes if all(getattr(o.cell, name) == value for name, value in wanted.items())]


def _methods(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.cell.label for outcome in outcomes))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _conditions(outcomes: Sequence[Outcome]) -> list[tuple[int, int]]:
    return sorted({(outcome.cell.reuse, outcome.cell.lag) for outcome in outcomes})


def _named(condition: tuple[int, int]) -> str:
    reuse, lag = condition
    return f"lag {lag}" if reuse == 1 else f"reuse {reuse}"


def _main(outcomes: Sequence[Outcome]) -> str:
    main = _of(outcomes, part="main")
    conditions = _conditions(main)
    rows = []
    for method in _methods(main):
        found = {(o.cell.reuse, o.cell.lag): o.spread for o in _of(main, label=method)}
        rows.append([f"`{method}`", *(found.get(condition, NOT_YET) for condition in conditions)])
    return _table(["method", *map(_named, conditions)], rows)


def _tuned(outcomes: Sequence[Outcome]) -> str:
    main = _of(outcomes, part="main")
    conditions = _conditions(main)
    rows = []
    for method in _methods(main):
        found = {(o.cell.reuse, o.cell.lag): _setting(o.best) for o in _of(main, label=method)}
        rows.append([f"`{method}`", *(found.get(condition, NOT_YET) for condition in conditions)])
    return _table(["method", *map(_named, conditions)], rows)


def _setting(best: Run | None) -> str:
    return NOT_YET if best is None else f"{best.lr:g} {best.schedule}"


def _tried(outcomes: Sequence[Outcome]) -> str:
    """Of every method and every variant of `stalewise` at the largest lag that the main table has."""
    main = _of(outcomes, part="main", reuse=1)
    largest = max((outcome.cell.lag for outcome in main), default=0)
    variants = [o for o in _of(outcomes, part="ablations") if o.cell.options]
    rows = [o for o in _of(main, lag=largest) + variants if o.tried]
    columns = [(schedule, lr) for schedule in SCHEDULES for lr in RATES if any((schedule, lr) in o.tried for o in rows)]
    return _table(
        ["method", *(f"{lr:g} {schedule}" for schedule, lr in columns)],
        [[_label(o), *(_percent(o.tried.get(column)) for column in columns)] for o in rows],
    )


def _label(outcome: Outcome) -> str:
    cell = outcome.cell
    return f"`{cell.label}`" if cell.label == cell.method else cell.label


def _percent(value: float | None) -> str:
    return NOT_YET if value is None else f"{100 * value:.1f}"


def _kept(outcomes: Sequence[Outcome]) -> str:
    main = _of(outcomes, part="main", reuse=1)
    rows = []
    for method in _methods(main):
        by_lag = {outcome.cell.lag: outcome for outcome in _of(main, label=method)}
        fresh = by_lag[0].median if 0 in by_lag else None
        lags = [lag for lag in sorted(by_lag) if lag]
        kept = [_share(by_lag[lag].median, fresh) for lag in lags]
        dips = [_points(by_lag[lag].deepest_dip) for lag in (0, *lags) if lag in by_lag]
        rows.append([f"`{method}`", *kept, *dips])
    lags = sorted({outcome.cell.lag for outcome in main})
    head = [f"kept at lag {lag}" for lag in lags if lag] + [f"deepest late dip, lag {lag}" for lag in lags]
    return _table(["method", *head], rows)


def _share(value: float | None, of: float | None) -> str:
    return NOT_YET if value is None or not of else f"{100 * value / of:.0f} %"


def _points(value: float | None) -> str:
    return NOT_YET if value is None else f"{100 * value:.0f} points"


def _rollouts(outcomes: Sequence[Outcome]) -> str:
    main = _of(outcomes, part="main", lag=0)
    reference = next((o.median for o in _of(main, label="grpo", reuse=1)), None)
    if reference is None:
        return "On-policy `grpo` has not run yet."
    goal = 0.9 * reference
    reuses = sorted({outcome.cell.reuse for outcome in main})
    rows = []
    for method in _methods(main):
        found = {o.cell.reuse: _to_reach(goal, o.curves) for o in _of(main, label=method)}
        rows.append([f"`{method}`", *(found.get(reuse, NOT_YET) for reuse in reuses)])
    head = _table(["method", *(f"reuse {reuse}" for reuse in reuses)], rows)
    return f"Goal: {100 * goal:.1f} %, nine tenths of the final accuracy of on-policy `grpo`.\n\n{head}"


def _to_reach(goal: float, curves: Sequence[Sequence[Point]]) -> str:
    if not curves:
        return NOT_YET
    firsts = [next((rollouts for _, rollouts, accuracy in curve if accuracy >= goal), None) for curve in curves]
    reached = sorted(first for first in firsts if first is not None)
    if len(reached) * 2 <= len(firsts):
        return f"never ({len(reached)} of {len(firsts)} runs did)"
    return f"{sorted(float('inf') if f is None else f for f in firsts)[len(firsts) // 2]:,.0f}"


def _listed(part: str) -> Callable[[Sequence[Outcome]], str]:
    def block(outcomes: Sequence[Outcome]) -> str:
        rows = [[_label(o), _setting(o.best), o.accepted, o.spread] for o in _of(outcomes, part=part)]
        return _table(["method", "tuned to", "sequences kept by its gates", "final accuracy, %"], rows)

    return block


def _tasks(outcomes: Sequence[Outcome]) -> str:
    tasks = _of(outcomes, part="tasks")
    conditions = sorted({(outcome.cell.task, outcome.cell.lag) for outcome in tasks})
    rows = []
    for method in _methods(tasks):
        found = {(o.cell.task, o.cell.lag): o.spread for o in _of(tasks, label=method)}
        rows.append([f"`{method}`", *(found.get(condition, NOT_YET) for condition in conditions)])
    return _table(["method", *(f"{task}, lag {lag}" for task, lag in conditions)], rows)


def _clip(outcomes: Sequence[Outcome]) -> str:
    """Cells of another clip beside those of the usual one: finals, and the falls of all runs on the way."""
    rows = []
    for other in _of(outcomes, part="clip"):
        cell = other.cell
        usual = next(
            o
            for part in ("main", "tasks")
            for o in _of(outcomes, part=part, task=cell.task, method=cell.method, lag=cell.lag, reuse=1)
        )
        setting = _setting(other.best)
        assert usual.best is None or _setting(usual.best) == setting, f"{cell.method} is tuned to another rate now"
        harder = "never" if cell.grad_clip_norm > 1.0 else f"{cell.grad_clip_norm:g}"
        numbers = [f(o) for f in (lambda o: o.spread, _falls) for o in (usual, other)]
        rows.append([_label(other), f"{cell.task}, lag {cell.lag}", setting, harder, *numbers])
    head = [
        "method",
        "task",
        "rate",
        "clipped at",
        "final, clipped at 1",
        "final, so clipped",
        "falls, at 1",
        "falls, so",
    ]
    return _table(head, rows)


def _falls(outcome: Outcome) -> str:
    """The deepest fall of each run on its way, in points, the deepest first."""
    return (
        ", ".join(f"{100 * fall:.0f}" for fall in sorted(map(_deepest_fall, outcome.curves), reverse=True)) or NOT_YET
    )


def _place(outcome: Outcome) -> str:
    cell = outcome.cell
    task = f"{cell.task}, " if cell.part in ("tasks", "clip") else ""
    clip = f", clipped at {cell.grad_clip_norm:g}" if cell.part == "clip" else ""
    return f"{_label(outcome)}, {task}{_named((cell.reuse, cell.lag))}{clip}"


def _failures(outcomes: Sequence[Outcome]) -> str:
    lines = [f"- {_place(o)}: {failure}" for o in outcomes for failure in o.failures]
    lines += [f"- {_place(o)}: {', '.join(map(str, o.skipped))} updates skipped" for o in outcomes if any(o.skipped)]
    return "\n".join(lines) or "None of the final runs made so far broke or skipped an update."


def _of_main_with_finals(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in _of(outcomes, part="main") if outcome.finals]


def _plots(outcomes: Sequence[Outcome]) -> str:
    if not _of_main_with_finals(outcomes):
        return "The plots come with the first final run."
    return f"![final accuracy against lag](images/{LAGS})\n![accuracy against rollouts](images/{CURVES})"


def _progress(outcomes: Sequence[Outcome]) -> str:
    planned = sum(len(o.cell.final_seeds) * len(o.cell.warmup_seeds) for o in outcomes)
    tuned, made = sum(o.best is not None for o in outcomes), sum(len(o.finals) for o in outcomes)
    return f"Made so far: {tuned} of {len(outcomes)} cells tuned, {made} of {planned} final runs."


BLOCKS: dict[str, Callable[[Sequence[Outcome]], str]] = {
    "progress": _progress,
    "main": _main,
    "plots": _plots,
    "tuned": _tuned,
    "tried": _tried,
    "kept": _kept,
    "rollouts": _rollouts,
    "ablations": _listed("ablations"),
    "tasks": _tasks,
    "others": _listed("others"),
    "lag 512": _listed("lag 512"),
    "clip": _clip,
    "failures": _failures,
}


def _plot_curves(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy against rollouts: one panel a condition of the main table, one line a method, medians over runs."""
    main = _of(outcomes, part="main")
    conditions = _conditions(_of_main_with_finals(outcomes))
    figure = Figure(figsize=(4 * len(conditions), 3.6), layout="constrained")
    panels = figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
    for (reuse, lag), axes in zip(conditions, panels, strict=True):
        for number, method in enumerate(_methods(main)):
            for outcome in _of(main, label=method, reuse=reuse, lag=lag):
                points = list(zip(*outcome.curves, strict=False))
                axes.plot(
                    [same[0][1] for same in points],
                    [100 * median(accuracy for _, _, accuracy in same) for same in points],
                    label=method,
                    **_style(method, number),
                )
        axes.set(title=_named((reuse, lag)), xlabel="rollouts trained on", ylim=(0, 100))
    panels[0].set(ylabel="held-out accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=110)


def _style(method: str, number: int) -> dict[str, Any]:
    """Ours stands out; matplotlib's colours for the others."""
    return {"color": "black", "linewidth": 2.5, "zorder": 3} if method == "stalewise" else {"color": f"C{number}"}


def _plot_lags(outcomes: Sequence[Outcome], path: Path) -> None:
    """Final accuracy against lag: medians, with a bar from the lowest to the highest run."""
    main = _of(_of_main_with_finals(outcomes), reuse=1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(_methods(_of(outcomes, part="main"))):
        found = sorted(_of(main, label=method), key=lambda outcome: outcome.cell.lag)
        middles = [median(o.finals) for o in found]
        bars = [[m - min(o.finals), max(o.finals) - m] for m, o in zip(middles, found, strict=True)]
        axes.errorbar(
            [o.cell.lag + 1.5 * number for o in found],  # side by side, or the bars hide each other
            [100 * middle for middle in middles],
            yerr=[[100 * low for low, _ in bars], [100 * high for _, high in bars]],
            marker="o",
            capsize=3,
            label=method,
            **_style(method, number),
        )
    axes.set(xlabel="lag, updates", ylabel="final held-out accuracy, %", ylim=(0, 100))
    axes.legend(ncols=2)
    figure.savefig(path, dpi=110)
