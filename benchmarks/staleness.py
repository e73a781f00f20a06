"""The staleness study: what each method is worth on old data (docs/staleness.md).

python -m benchmarks.staleness run      resumes where it was stopped: [--part main] [--methods trm grpo] [--hours 3]
python -m benchmarks.staleness report   writes docs/staleness.md from the results
python -m benchmarks.staleness quick    every path in minutes, numbers of no meaning
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.study.plan import WARMUP_SEEDS, Cell, cells, due, quick_cells
from benchmarks.study.report import write_report
from benchmarks.study.results import Results, key_of
from benchmarks.study.simulation import Result, Run, simulate
from learner.objectives.recipes import RECIPES

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks/results/staleness.jsonl"
MODELS = REPOSITORY / "runs/staleness-models"
REPORT = REPOSITORY / "docs/staleness.md"


def make_runs(wanted: Iterable[Cell], results: Results, *, models: Path, jobs: int, hours: float) -> None:
    """Make every run of the cells that is not there, one process a run, until done or the hours are over."""
    cells_, deadline_s = list(wanted), time.monotonic() + 3600 * hours
    commit, under_way = _commit(), dict[Future[Result], Run]()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the children: torch reads it when it is imported
    with _progress() as progress, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        bar = progress.add_task("runs", total=None, completed=len(results))
        while True:
            busy = {key_of(run) for run in under_way.values()}
            waiting = {
                key: run for cell in cells_ for run in due(cell, results.final) if (key := key_of(run)) not in busy
            }
            progress.update(bar, total=len(results) + len(under_way) + len(waiting), completed=len(results))
            if time.monotonic() < deadline_s:
                for run in list(waiting.values())[: jobs - len(under_way)]:
                    under_way[pool.submit(simulate, run, models)] = run
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                run, result = under_way.pop(future), future.result()
                results.add(run, result, commit=commit)
                progress.console.print(_sentence(run, result))


def _sentence(run: Run, result: Result) -> str:
    start = result.curve[0][2]
    return (
        f"{run.task} {run.objective} {dict(run.options)} lag {run.lag} reuse {run.reuse} lr {run.lr:g} {run.schedule}"
        f" seed {run.seed}/{run.warmup_seed}: {start:.3f} -> {result.final:.3f} in {result.seconds:.0f} s"
        + (f" ({result.failure})" if result.failure else "")
    )


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()


def _run(arguments: argparse.Namespace) -> None:
    wanted = [
        replace(cell, warmup_seeds=cell.warmup_seeds[: arguments.checkpoints])
        for cell in cells()
        if arguments.part in (None, cell.part) and cell.method in (arguments.methods or RECIPES)
    ]
    make_runs(wanted, Results(RESULTS), models=MODELS, jobs=arguments.jobs, hours=arguments.hours)


def _report(arguments: argparse.Namespace) -> None:
    write_report(Results(RESULTS), list(cells()), REPORT)


def _quick(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        results = Results(Path(directory) / "results.jsonl")
        make_runs(quick_cells(), results, models=MODELS, jobs=arguments.jobs, hours=1.0)
        page = Path(shutil.copy(REPORT, directory))
        write_report(results, list(quick_cells()), page)
        print(page.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {"run": _run, "report": _report, "quick": _quick}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--part", choices=sorted({cell.part for cell in cells()}), help="one part of the study")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, help="these methods alone")
    parser.add_argument("--checkpoints", type=int, choices=range(1, len(WARMUP_SEEDS) + 1), help="of the final runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side; one a core")
    parser.add_argument("--hours", type=float, default=24.0, help="begin no run after this time")
    arguments = parser.parse_args()
    commands[arguments.command](arguments)


if __name__ == "__main__":
    main()
