"""Child processes of one run: started with their own log, watched, restarted when they die, ended by SIGTERM."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from buffer.errors import InvalidSettings, StalewiseError

STOP_TIMEOUT_S = 30.0
"""A child that drains longer than this is killed; draining takes a step or a request, seconds at most."""


@dataclass
class Child:
    """One supervised process of a run."""

    name: str
    arguments: Sequence[str]
    """What follows `stalewise` on the command line."""
    log_path: Path
    environment: Mapping[str, str]
    may_finish: bool = False
    """Whether exit code 0 is the end of its work rather than a death."""
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    def start(self) -> None:
        """Start the process; its output is appended to the log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then drains in order
                preexec_fn=_end_with_parent,
            )

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.poll()

    def last_words(self, lines: int = 5) -> str:
        """Return the end of the log, for an error message."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ask it to drain, and kill it when it does not."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, kill -9 included; Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class ChildFailed(StalewiseError):
    """A process of the run ended on its own more often than it may."""


@dataclass
class Supervisor:
    """Restarts children that die, within a budget, and says so through `events`."""

    max_restarts: int
    children: list[Child] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def start(self, child: Child) -> Child:
        """Start a child and watch it from now on."""
        child.start()
        self.children.append(child)
        return child

    def check(self) -> None:
        """Restart every child that died.

        Raises ChildFailed when one used up its restarts, or refused its settings: it would refuse them again.
        """
        for child in self.children:
            code = child.exit_code
            if code is None or (code == 0 and child.may_finish):
                continue
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if child.restarts >= self.max_restarts or code == InvalidSettings.exit_code:
                raise ChildFailed(
                    f"{child.name} {how} after {child.restarts} restarts; its last lines:\n{child.last_words()}",
                    hint=f"see {child.log_path}",
                )
            child.restarts += 1
            self.note(f"{child.name} {how}: started again ({child.restarts} of {self.max_restarts})")
            child.start()

    def note(self, event: str) -> None:
        """Remember something that the screen should say; the same twice in a row counts once."""
        if not self.events or self.events[-1] != event:
            self.events.append(event)

    def stop(self) -> None:
        """Stop all children, last started first."""
        for child in reversed(self.children):
            child.stop()
