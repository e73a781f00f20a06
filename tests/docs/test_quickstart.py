"""Every command of the quickstart does what the page says."""

import time

import pytest
from transformers import AutoTokenizer

from actor.settings import TaskSettings
from actor.tasks import make_task
from buffer.errors import InvalidSettings
from tests.docs.conftest import QUICKSTART, Clone


@pytest.mark.timeout(300)
def test_the_processes_start_in_any_order_and_the_watching_commands_answer(loop: Clone) -> None:
    deadline_s = time.monotonic() + 240
    while True:
        answers = [loop.run(command) for command in QUICKSTART["watch"].splitlines()]
        if all(answer.returncode == 0 for answer in answers) and '"accepted": 0' not in answers[0].stdout:
            break
        assert all(process.poll() is None for process in loop.processes), loop.log()
        assert time.monotonic() < deadline_s, loop.log()
        time.sleep(0.5)

    assert '"run_id": "demo"' in answers[0].stdout
    assert answers[1].stdout.startswith("run demo, latest version")


def test_the_commands_that_change_something_take_effect(clone: Clone) -> None:
    settings, shown, other = [clone.run(command) for command in QUICKSTART["change"].splitlines()]

    assert "limiter.min_size = 320" in settings.stdout
    assert "2601.22718" in shown.stdout
    assert 'learner.objective.name = "minpro"' in other.stdout


def test_a_model_of_ones_own_is_made_and_named(clone: Clone) -> None:
    made, settings = [clone.run(command) for command in QUICKSTART["model"].splitlines()]

    assert (made.returncode, settings.returncode) == (0, 0), made.stderr + settings.stderr
    assert (clone.directory / "runs/models/mine/model.safetensors").is_file()
    lines = settings.stdout.splitlines()
    assert 'run.model = "runs/models/mine"' in lines
    assert 'actor.task.name = "running_sums"' in lines
    tokenizer = AutoTokenizer.from_pretrained(clone.directory / "runs/models/mine")
    make_task(TaskSettings(), tokenizer)
    with pytest.raises(InvalidSettings, match="the tokenizer cannot express"):
        make_task(TaskSettings(name="chain_sum"), tokenizer)


def test_a_real_model_and_a_task_in_words_are_named(clone: Clone) -> None:
    (settings,) = [clone.run(command) for command in QUICKSTART["real-model"].splitlines()]

    assert 'actor.task.name = "chain_sum"' in settings.stdout.splitlines()
