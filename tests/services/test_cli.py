"""The command line itself: what it says of itself."""

import subprocess
import sys
from importlib.metadata import version


def test_version_is_what_a_bug_report_needs_and_help_names_the_project() -> None:
    command = [sys.executable, "-m", "services.cli"]

    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout

    assert told.startswith(
        f"stalewise {version('stalewise')}, Python {sys.version.split()[0]}, torch {version('torch')}"
    )
    assert "Asynchronous off-policy RL for language models" in helped
    assert "--version" in helped
