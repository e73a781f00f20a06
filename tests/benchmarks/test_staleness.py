"""The staleness study trains on data of exactly the age that it says, and tunes every cell by the same rule."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.plan import Cell, cells, due, tuning
from benchmarks.study.results import Results, key_of
from benchmarks.study.simulation import ROLLOUTS_PER_BATCH, Result, Run, simulate
from benchmarks.study.tasks import SLIPS, TASKS
from learner.objectives.recipes import RECIPES

SHIPPED = Path(__file__).parents[2] / "models/running-sums"
RUN = Run(objective="stalewise", lr=4e-4, schedule="linear", seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for task in TASKS:
        shutil.copytree(SHIPPED, directory / f"{task}-0")  # it knows no task but the first; the paths are the same
    return directory


def test_data_is_as_old_as_the_lag_and_each_rollout_is_counted_once(models: Path) -> None:
    lagged = simulate(replace(RUN, lag=2, updates=4), models)
    reused = simulate(replace(RUN, reuse=2, updates=3), models)

    assert (lagged.ages, lagged.failure) == ((2, 2), None)
    assert [rollouts for _, rollouts, _ in lagged.curve] == [ROLLOUTS_PER_BATCH * n for n in range(5)]
    assert reused.ages == (0, 1)
    assert [rollouts for _, rollouts, _ in reused.curve] == [ROLLOUTS_PER_BATCH * n for n in (0, 1, 1, 2)]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_the_whole_path(models: Path, task: str) -> None:
    made = simulate(replace(RUN, task=task, lag=1, updates=2), models)

    assert (made.ages, made.failure) == ((1, 1), None)


def result(final: float) -> Result:
    return Result(curve=[(0, 0, 0.2)], final=final, ages=(0, 0), metrics={}, failure=None, skipped=0, seconds=1.0)


def test_tuning_halves_the_candidates_and_the_best_mean_goes_on(tmp_path: Path) -> None:
    rates = (1e-4, 2e-4, 4e-4, 8e-4)
    cell = Cell(part="main", method="grpo", label="grpo", learning_rates=rates, schedules=("linear", "constant"))
    results = Results(tmp_path / "results.jsonl")
    finals = {
        (1e-4, "linear"): (0.5, 0.9),
        (2e-4, "linear"): (0.4,),
        (4e-4, "linear"): (0.6, 0.6),
        (8e-4, "linear"): (0.1,),
        (1e-4, "constant"): (0.45,),
        (4e-4, "constant"): (0.4,),
    }
    rungs = []
    for _ in range(3):
        rungs.append([(run.lr, run.schedule, run.seed) for run in due(cell, results.final)])
        for run in due(cell, results.final):
            results.add(run, result(finals[run.lr, run.schedule][run.seed - 100]), commit="c")
    again = Results(tmp_path / "results.jsonl")

    assert rungs[0] == [(rate, "linear", 100) for rate in rates]
    assert set(rungs[1]) == {(1e-4, "constant", 100), (4e-4, "constant", 100)}
    assert set(rungs[2]) == {(1e-4, "linear", 101), (4e-4, "linear", 101)}
    missing, best = tuning(cell, again.final)
    assert (missing, best and best.lr) == ([], 1e-4)  # a mean of .7 against .6
    assert {(run.lr, run.seed, run.warmup_seed) for run in due(cell, again.final)} == {
        (1e-4, seed, warmup_seed) for seed in (0, 1, 2) for warmup_seed in (0, 1)
    }


def test_tuning_goes_on_past_the_end_of_the_range_while_the_best_rate_is_there(tmp_path: Path) -> None:
    cell = Cell(part="main", method="grpo", label="grpo").lean()
    results = Results(tmp_path / "results.jsonl")
    asked = []
    for _ in range(3):
        runs = due(cell, results.final)
        asked.append([run.lr for run in runs])
        for run in runs:
            results.add(run, result(run.lr * 100 if run.lr < 5e-3 else 0.0), commit="c")

    assert asked == [[8e-4, 1.6e-3], [3.2e-3], [6.4e-3]]
    _, best = tuning(cell, results.final)
    assert best is not None
    assert best.lr == 3.2e-3


def test_a_changed_default_of_a_recipe_is_another_run() -> None:
    assert key_of(RUN) == key_of(replace(RUN, options={"max_k2": 0.5}))
    assert key_of(RUN) != key_of(replace(RUN, options={"max_k2": 0.25}))


def test_every_recipe_has_a_cell_at_lag_128_and_no_two_cells_are_one() -> None:
    planned = list(cells())

    assert {cell.method for cell in planned if cell.lag == 128 and cell.task == "running_sums"} == set(RECIPES)
    assert len({(c.part, c.label, c.lag, c.reuse, c.task) for c in planned}) == len(planned)


@pytest.mark.parametrize("name", TASKS)
def test_a_teacher_who_does_not_slip_is_right_and_one_who_slips_seldom_is(name: str) -> None:
    task, rng = TASKS[name](), np.random.default_rng(3)
    prompts = [task.sample(rng) for _ in range(400)]

    rewards = {
        slip: [task.reward(p, task.noisy_answer(p, rng, slip_probability=slip)) for p in prompts]
        for slip in (0.0, SLIPS[name])
    }

    assert sum(rewards[0.0]) == 400
    assert 0.1 < sum(rewards[SLIPS[name]]) / 400 < 0.3
    assert not {p.prompt_id for p in prompts} & {p.prompt_id for p in task.held_out()}
