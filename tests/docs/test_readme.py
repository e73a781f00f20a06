"""What the README tells a new user to type works."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from services.settings import RunConfig, load_config
from tests.docs.conftest import QUICKSTART, REPOSITORY, Clone
from tests.services.live import ServeProcess

README = (REPOSITORY / "README.md").read_text()
SUBMITTING = (REPOSITORY / "docs/submitting.md").read_text()


def block(name: str, page: str = README) -> str:
    """Return a block of code that a page marks."""
    found = re.search(rf"<!-- test:{name} -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_rollouts_submitted_by_curl_and_by_python_are_accepted(tmp_path: Path) -> None:
    serve, curl = block("submit").split("&\n", 1)
    service = ServeProcess(tmp_path, serve.split("--set ")[1].strip(), name=RunConfig().run.name)
    answers = []

    try:
        url = service.wait_until_ready()
        for command in (shlex.split(curl), [sys.executable, "-c", block("submit-python", SUBMITTING)]):
            here = [word.replace("http://127.0.0.1:8642", url) for word in command]
            answers.append(subprocess.run(here, capture_output=True, text=True, check=True).stdout)
    finally:
        service.stop()

    assert [[result["outcome"] for result in json.loads(answer)["results"]] for answer in answers] == [["accepted"]] * 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", re.findall(r"^    (stalewise .*?)(?:  +#.*)?$", README, re.MULTILINE))
def test_every_command_works(command: str, loop: Clone) -> None:
    words = shlex.split(command)
    if words[1] in ("serve", "learn", "act"):
        assert words[1:] in [shlex.split(line)[1:] for line in QUICKSTART["processes"].splitlines()]
        return
    if words[1] == "stats":
        assert "weight version" in watched(command, loop, until="weight version")
        return
    cheaper = " --warmup-steps 20" if words[1] == "make-model" else ""  # the default takes a minute
    ended = loop.run(command + cheaper)

    assert ended.returncode == 0, ended.stderr
    if words[1] == "export":
        again = loop.run(command.replace("export", "import"))
        assert (again.returncode, again.stderr) == (0, "")


def watched(command: str, loop: Clone, *, until: str) -> str:
    """Run a command on a terminal until it shows a text, then end it; return what was on the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        loop.words(command), cwd=loop.directory, env=loop.environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while until.encode() not in shown:
        shown += os.read(ours, 4096)
    process.terminate()
    while process.poll() is None:
        with suppress(OSError):  # the terminal is gone when the process is
            os.read(ours, 4096)
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    model = load_config(path).run.model

    assert model.parts[0] != "models" or (REPOSITORY / model / "config.json").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (REPOSITORY / target).exists()
