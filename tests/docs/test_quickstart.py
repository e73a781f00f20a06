"""Every command of the quickstart does what the page says, in a directory that has what a clone has."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BLOCKS = dict(
    re.findall(
        r"<!-- test:(\w+) -->\n```bash\n(.*?)```", (REPOSITORY / "docs/quickstart.md").read_text(), flags=re.DOTALL
    )
)


def commands(block: str) -> list[list[str]]:
    """Return the commands of a block, to be run by this interpreter."""
    lines = [shlex.split(line) for line in BLOCKS[block].splitlines()]
    assert all(line[0] == ".venv/bin/stalewise" for line in lines)
    return [[sys.executable, "-m", "services.cli", *line[1:]] for line in lines]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clone")
    for copied in ("recipes", "models"):
        (directory / copied).symlink_to(REPOSITORY / copied)
    return directory


def run(command: list[str], clone: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def processes(clone: Path) -> Iterator["list[subprocess.Popen[bytes]]"]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "STALEWISE_SERVICE__PORT": str(port)}
    started: list[subprocess.Popen[bytes]] = []
    with (clone / "log").open("wb") as log:
        for command in commands("processes"):
            started.append(subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=log))
        yield started
        for process in reversed(started):
            process.terminate()
            process.wait(60)


@pytest.mark.timeout(300)
def test_the_processes_start_in_any_order_and_the_watching_commands_answer(
    clone: Path, processes: "list[subprocess.Popen[bytes]]"
) -> None:
    deadline_s = time.monotonic() + 240
    while True:
        answers = [run(command, clone) for command in commands("watch")]
        if all(answer.returncode == 0 for answer in answers) and '"accepted": 0' not in answers[0].stdout:
            break
        assert all(process.poll() is None for process in processes), (clone / "log").read_text()
        assert time.monotonic() < deadline_s, (clone / "log").read_text()
        time.sleep(0.5)

    assert '"run_id": "demo"' in answers[0].stdout
    assert answers[1].stdout.startswith("run demo, latest version")


def test_the_commands_that_change_something_take_effect(clone: Path) -> None:
    settings, shown, other = [run(command, clone) for command in commands("change")]

    assert "limiter.min_size = 320" in settings.stdout
    assert "2601.22718" in shown.stdout
    assert 'learner.objective.name = "minpro"' in other.stdout


def test_a_model_of_ones_own_is_made_and_named(clone: Path) -> None:
    made, settings = [run(command, clone) for command in commands("model")]

    assert (made.returncode, settings.returncode) == (0, 0), made.stderr + settings.stderr
    assert (clone / "runs/models/mine/model.safetensors").is_file()
    assert 'actor.task.name = "chain_sum"' in settings.stdout
