"""The commands of the documentation, in a directory that has what a clone has, with the whole loop running in it."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = dict(
    re.findall(
        r"<!-- test:([\w-]+) -->\n```bash\n(.*?)```", (REPOSITORY / "docs/quickstart.md").read_text(), flags=re.DOTALL
    )
)


@dataclass
class Clone:
    """Where commands are run, by this interpreter, with a port of their own."""

    directory: Path
    environment: dict[str, str]
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def words(self, command: str) -> list[str]:
        """Return what to execute for a line of the documentation."""
        program, *arguments = shlex.split(command)
        assert program in ("stalewise", ".venv/bin/stalewise"), command
        return [sys.executable, "-m", "services.cli", *arguments]

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        return subprocess.run(
            self.words(command), cwd=self.directory, env=self.environment, capture_output=True, text=True, check=False
        )

    def log(self) -> str:
        """Return what the processes have printed."""
        return (self.directory / "log").read_text()


@pytest.fixture(scope="package")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    directory = tmp_path_factory.mktemp("clone")
    for copied in ("recipes", "models"):
        (directory / copied).symlink_to(REPOSITORY / copied)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"PYTHONPATH": str(REPOSITORY), "STALEWISE_SERVICE__PORT": str(port)}
    return Clone(directory, {**os.environ, **place})


@pytest.fixture(scope="package")
def loop(clone: Clone) -> Iterator[Clone]:
    """The clone with the processes of the quickstart running."""
    with (clone.directory / "log").open("wb") as log:
        for command in QUICKSTART["processes"].splitlines():
            clone.processes.append(
                subprocess.Popen(
                    clone.words(command), cwd=clone.directory, env=clone.environment, stdout=log, stderr=log
                )
            )
        yield clone
        for process in reversed(clone.processes):
            process.terminate()
            process.wait(60)
