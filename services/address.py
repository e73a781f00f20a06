"""Where a run's service is: service.json in the run's directory, written once it listens."""

import json
import os
from pathlib import Path

_FILE = "service.json"


def write_address(directory: Path, url: str) -> None:
    """Say, in one step, that this process serves the run at `url`."""
    partial = directory / f"{_FILE}.{os.getpid()}"
    partial.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    partial.replace(directory / _FILE)


def remove_address(directory: Path) -> None:
    """Say that this process no longer serves the run."""
    (directory / _FILE).unlink(missing_ok=True)


def read_address(directory: Path) -> str | None:
    """Return the URL of the run's service on this machine; None when none lives."""
    try:
        address = json.loads((directory / _FILE).read_text())
        os.kill(address["pid"], 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        pass  # it lives, under another user
    url: str = address["url"]
    return url
