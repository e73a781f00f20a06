"""`make compare`: GRPO, truncated importance sampling and `stalewise` on the same stale data, live in the terminal.

Until update LAG all three train on the very same rollouts, those of the start policy; later data is LAG updates old.
Each method runs in a process of its own; the chart is drawn again after each evaluation and saved as a PNG.

Usage: python -m benchmarks.compare [--lag 128] [--updates 180] [--lr 8e-4] [--png runs/compare.png]
"""

import argparse
import os
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

import plotext
from matplotlib.figure import Figure
from rich.live import Live
from rich.text import Text

from benchmarks.study.simulation import Point, Run, simulate

METHODS = {"grpo": "GRPO", "tis": "token TIS", "stalewise": "stalewise"}
MODELS = Path("runs/staleness-models")
Curves = Mapping[str, list[Point]]


def _work(run: Run, messages: "Queue[tuple[str, Point | None]]") -> None:
    simulate(run, MODELS, lambda point: messages.put((run.objective, point)))
    messages.put((run.objective, None))


def chart(curves: Curves, *, lag: int, updates: int) -> str:
    """Return the chart as text with colours."""
    plotext.clear_figure()
    plotext.plot_size(100, 26)
    plotext.theme("clear")
    for (method, label), colour in zip(METHODS.items(), ("blue", "red", "green"), strict=True):
        if not (points := curves[method]):
            continue  # no evaluation yet
        plotext.plot([u for u, _, _ in points], [100 * a for _, _, a in points], label=label, color=colour)
    plotext.xlim(0, updates)
    plotext.ylim(0, 100)
    plotext.title(f"held-out accuracy (%) by update, data {lag} updates old")
    return str(plotext.build())


def save_png(curves: Curves, path: Path, *, lag: int) -> None:
    """Draw the same chart as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, label in METHODS.items():
        axes.plot([u for u, _, _ in curves[method]], [100 * a for _, _, a in curves[method]], label=label)
    axes.set(xlabel="update", ylabel="held-out accuracy, %", ylim=(0, 100), title=f"Data {lag} updates old")
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def compare(*, lag: int, updates: int, lr: float, png: Path) -> None:
    """Run the three side by side; return when all are done."""
    context = get_context("spawn")
    messages: Queue[tuple[str, Point | None]] = context.Queue()
    runs = [Run(objective=m, lag=lag, updates=updates, lr=lr, schedule="linear", seed=0) for m in METHODS]
    processes = [context.Process(target=_work, args=(run, messages), daemon=True) for run in runs]
    for process in processes:
        process.start()
    curves: dict[str, list[Point]] = {method: [] for method in METHODS}
    running = len(processes)
    with Live(refresh_per_second=2) as live:
        while running:
            try:
                method, point = messages.get(timeout=1)
            except Empty:
                if any(process.exitcode for process in processes):
                    sys.exit("compare: a run died; its error stands above")
                continue
            if point is None:
                running -= 1
            else:
                curves[method].append(point)
                live.update(Text.from_ansi(chart(curves, lag=lag, updates=updates)))
    save_png(curves, png, lag=lag)
    for method, label in METHODS.items():
        print(f"{label:<12}{100 * curves[method][0][2]:6.1f} % -> {100 * curves[method][-1][2]:5.1f} %")
    print(f"written: {png}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lag", type=int, default=128)
    parser.add_argument("--updates", type=int, default=180)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--png", type=Path, default=Path("runs/compare.png"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the children: torch reads it when it is imported
    compare(lag=arguments.lag, updates=arguments.updates, lr=arguments.lr, png=arguments.png)


if __name__ == "__main__":
    main()
