"""A run whose service, Redis and clients are killed with -9 and started again, one victim after another."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos.clients import Service, draw_next, insert_next, journal_of, publish
from tests.services.live import ServeProcess, redis_pid, workers_of

log = logging.getLogger(__name__)

WRITERS = ("left", "middle", "right")
SAMPLER = "sampler"
VICTIMS = ("service", "redis", "writer", SAMPLER, "service and redis")


class Ruin:
    """Real processes in a directory, and the means to kill them. `redis_kills` holds (before, gone) in seconds."""

    def __init__(self, runs_dir: Path, appendfsync: str, *, workers: int) -> None:
        self._victims = VICTIMS if workers == 1 else (*VICTIMS, "worker")
        self._serve = ServeProcess(
            runs_dir,
            f"redis.appendfsync={appendfsync}",
            f"service.workers={workers}",
            "limiter.min_size=4",
            "learner.groups_per_update=4",
            "limiter.error_buffer=1e12",
            "table.repeat_window_s=86400",
        )
        self.directory = self._serve.directory
        self.service = Service(self.directory)
        self.redis_kills: list[tuple[float, float]] = []
        self.service.call(lambda client: publish(client, 0))
        self._clients = {name: self._start(name) for name in (*WRITERS, SAMPLER)}

    def endure(self, kills: int, rng: random.Random) -> None:
        """Kill `kills` times; a Redis or everything at once only while all work, others also while they recover."""
        for victim in _victims(self._victims, kills, rng):
            if "redis" in victim or rng.random() < 0.7:
                self.wait_for_answers()
            time.sleep(rng.uniform(0.0, 0.3))
            log.info("kill -9 of the %s", victim)
            self._kill(victim, rng)
        self.wait_for_answers()

    def wait_for_answers(self) -> None:
        """Return once every client was answered since the call: whatever was killed has recovered."""
        for _ in range(2):  # the first note may be of an answer from before the call
            self._wait_for_notes()

    def settle(self) -> None:
        """Kill all clients and repeat the step that each was in: then the journals say all that was ever asked."""
        for process in self._clients.values():
            process.kill()
            process.wait()
        for name in WRITERS:
            insert_next(self.service, journal_of(self.directory, name), name)
        draw_next(self.service, journal_of(self.directory, SAMPLER))

    def close(self) -> None:
        """End every process."""
        for process in self._clients.values():
            process.kill()
            process.wait()
        self.service.close()
        self._serve.stop()

    def _wait_for_notes(self) -> None:
        journals = [journal_of(self.directory, name) for name in self._clients]
        before = [journal.size_bytes() for journal in journals]
        while any(journal.size_bytes() == size for journal, size in zip(journals, before, strict=True)):
            for name, process in self._clients.items():
                assert process.poll() is None, f"{name} ended by itself: {self._log_path(name).read_text()}"
            assert self._serve.process.poll() is None, self._serve.log_path.read_text()
            time.sleep(0.01)

    def _kill(self, victim: str, rng: random.Random) -> None:
        if victim in ("writer", SAMPLER):
            name = rng.choice(WRITERS) if victim == "writer" else SAMPLER
            self._clients[name].kill()
            self._clients[name].wait()
            self._clients[name] = self._start(name)
            return
        if victim == "worker":
            while not (workers := sorted(workers_of(self._serve))):  # the service has just been started again
                time.sleep(0.01)
            os.kill(rng.choice(workers), signal.SIGKILL)
            return
        if "redis" in victim:
            self._kill_redis()
        if "service" in victim:
            self._serve.process.kill()
        self._serve.process.wait()  # without its Redis it ends by itself
        self._serve.restart()

    def _kill_redis(self) -> None:
        pid, before_s = redis_pid(self.directory), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():  # its guard, a shell, reaps it
            time.sleep(0.001)
        self.redis_kills.append((before_s, time.monotonic()))

    def _start(self, name: str) -> "subprocess.Popen[bytes]":
        kind = SAMPLER if name == SAMPLER else "writer"
        with self._log_path(name).open("ab") as output:
            command = [sys.executable, "-m", "tests.chaos.clients", kind, str(self.directory), name]
            return subprocess.Popen(command, stdout=output, stderr=output)

    def _log_path(self, name: str) -> Path:
        return self.directory.parent / f"{name}.log"


def _victims(victims: Sequence[str], kills: int, rng: random.Random) -> Iterator[str]:
    """Yield victims in random order, each equally often."""
    order: Sequence[str] = ()
    for kill in range(kills):
        if kill % len(victims) == 0:
            order = rng.sample(victims, len(victims))
        yield order[kill % len(victims)]
