"""What the README tells a new user to type works."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from services.cli import app
from services.settings import RunConfig, load_config
from tests.services.live import ServeProcess

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_the_submitted_rollout_is_accepted(tmp_path: Path) -> None:
    block = re.search(r"<!-- test:submit -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    serve, curl = block[1].split("&\n", 1)
    words = shlex.split(curl)
    path = next(word for word in words if word.startswith("http")).split(":8642")[1]
    service = ServeProcess(tmp_path, serve.split("--set ")[1].strip(), name=RunConfig().run.name)

    try:
        answer = httpx.post(service.wait_until_ready() + path, json=json.loads(words[words.index("-d") + 1]))
    finally:
        service.stop()

    assert (answer.status_code, [r["outcome"] for r in answer.json()["results"]]) == (200, ["accepted"])


@pytest.mark.parametrize("command", re.findall(r"^    (stalewise .*?)(?:  +#.*)?$", README, re.MULTILINE))
def test_every_command_exists_with_its_options(command: str) -> None:
    words = shlex.split(command)[1:]
    help_of = CliRunner().invoke(app, [words[0], "--help"])

    assert help_of.exit_code == 0, command
    for option in (word for word in words if word.startswith("--")):
        assert option in help_of.output, command


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    model = load_config(path).run.model

    assert model.parts[0] != "models" or (REPOSITORY / model / "config.json").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (REPOSITORY / target).exists()
