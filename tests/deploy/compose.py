"""docker-compose.yml without an engine: its commands and health checks as processes of this machine.

What a container would have of its own is put in its place: names and ports become loopback addresses, volumes become
directories, and the working directory holds links to what the image copies.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from buffer.redis_server import redis_executable

REPOSITORY = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())


def resolved(text: str, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return a text of the file with ${NAME:-default} resolved."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)


def variables(env_file: str) -> dict[str, str]:
    """Return what `docker compose --env-file` reads."""
    lines = (REPOSITORY / env_file).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def profile(name: str) -> dict[str, Any]:
    """Return the services that a profile starts."""
    return {key: value for key, value in COMPOSE["services"].items() if name in value.get("profiles", [name])}


@dataclass
class Machine:
    """Stands in for the engine: one directory, two free ports."""

    directory: Path
    redis_port: int = field(default_factory=lambda: _free_port())
    service_port: int = field(default_factory=lambda: _free_port())
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start a service's command with its environment."""
        home = self._home(name)
        with (home / "log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self._command(name, COMPOSE["services"][name]["command"], home),
                env=self._environment(name),
                cwd=home,
                stdout=log,
                stderr=log,
            )

    def is_healthy(self, name: str) -> bool:
        """Run a service's health check once."""
        kind, *command = COMPOSE["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        home = self._home(name)
        check = self._command(name, command, home)
        return subprocess.run(check, env=self._environment(name), cwd=home, capture_output=True).returncode == 0

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float = 240.0) -> None:
        """Return when the condition holds; fail when a process ends or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            for name, process in self.running.items():
                assert process.poll() in (None, 0), self.log(name)
            assert time.monotonic() < deadline_s, {name: self.log(name) for name in self.running}
            time.sleep(0.1)

    def log(self, name: str) -> str:
        """Return what a service has printed."""
        return (self._home(name) / "log").read_text()

    def token(self, role: str) -> str:
        """Return the token of a role."""
        return (self.directory / "tokens" / role).read_text().strip()

    @property
    def url(self) -> str:
        """Where the service listens."""
        return f"http://127.0.0.1:{self.service_port}"

    def _home(self, name: str) -> Path:
        home = self.directory / name
        if not home.is_dir():
            home.mkdir()
            for copied in ("recipes", "models"):
                (home / copied).symlink_to(REPOSITORY / copied)
        return home

    def _placed(self, text: str) -> str:
        text = resolved(text)
        for there, here in {
            "redis:6379": f"127.0.0.1:{self.redis_port}",
            "service:8642": f"127.0.0.1:{self.service_port}",
            "127.0.0.1:8642": f"127.0.0.1:{self.service_port}",
            "0.0.0.0": "127.0.0.1",
            "/run/stalewise": str(self.directory / "tokens"),
        }.items():
            text = text.replace(there, here)
        return text

    def _command(self, name: str, command: list[str], home: Path) -> list[str]:
        program, *arguments = map(self._placed, command)
        redis = Path(redis_executable())
        programs: Mapping[str, list[str]] = {
            "stalewise": [sys.executable, "-m", "services.cli"],
            "python": [sys.executable],
            "redis-server": [str(redis)],
            "redis-cli": [str(redis.with_name("redis-cli")), "-p", str(self.redis_port)],
        }
        place = ["--port", str(self.redis_port), "--bind", "127.0.0.1", "--dir", str(home)]
        return [*programs[program], *arguments, *(place if program == "redis-server" else [])]

    def _environment(self, name: str) -> dict[str, str]:
        own = {key: self._placed(value) for key, value in COMPOSE["services"][name].get("environment", {}).items()}
        machine = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        return {**machine, "STALEWISE_SERVICE__PORT": str(self.service_port), **own}


@contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    """Yield a machine; what still runs on it is stopped afterwards, the last one started first."""
    machine = Machine(directory)
    try:
        yield machine
    finally:
        for process in reversed(machine.running.values()):
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
