"""The real `stalewise demo` with its real processes, shortened by settings."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import StalewiseError
from services.address import read_address
from services.report import Summary

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class DemoProcess:
    """A running demo."""

    process: subprocess.Popen[bytes]
    runs_dir: Path

    @property
    def directory(self) -> Path:
        """The one run's directory."""
        (directory,) = self.runs_dir.iterdir()
        return directory

    def pid(self, command: str) -> int:
        """Return the pid of the first child that runs `stalewise <command>`."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in map(int, children):
            if command in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return pid
        raise AssertionError(f"no child runs {command!r}")

    def stats(self) -> dict[str, Any] | None:
        """Return GET /v1/stats; None while the service is away."""
        address = read_address(self.directory) if list(self.runs_dir.glob("*")) else None
        if address is None:
            return None
        client = ServiceClient(address, settings=ClientSettings(retry_budget_s=0.0, read_timeout_s=10.0))
        try:
            return client.stats()
        except StalewiseError:
            return None
        finally:
            client.close()

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], *, timeout_s: float) -> dict[str, Any]:
        """Return the first stats that meet the condition; fail when the demo ends or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, f"the demo ended with {self.process.returncode}\n{self.output()}"
            stats = self.stats()
            if stats is not None and condition(stats):
                return stats
            time.sleep(0.2)
        raise AssertionError(f"not within {timeout_s:g} s; stats {self.stats()}\n{self.output()}")

    def finish(self, *, timeout_s: float) -> Summary:
        """Wait for the end and return the summary that it wrote."""
        code = self.process.wait(timeout_s)
        assert code == 0, self.output()
        return Summary.model_validate_json((self.directory / "summary.json").read_bytes())

    def output(self) -> str:
        """What the demo and its children said, the ends of it."""
        logs = [self.runs_dir.with_suffix(".out"), *sorted(self.runs_dir.glob("*/logs/*.log"))]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())


@contextmanager
def demo_process(directory: Path, settings: Mapping[str, object]) -> Iterator[DemoProcess]:
    """Start the demo below `directory`; end it, and with it all its processes, when the block is left."""
    runs_dir = directory / "runs"
    overrides = {"run.runs_dir": runs_dir, "run.model": REPOSITORY / "models/running-sums", **settings}
    options = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    with runs_dir.with_suffix(".out").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "demo", "--config", str(REPOSITORY / "recipes/demo.toml"), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield DemoProcess(process, runs_dir)
    finally:
        process.terminate()
        process.wait(60)
