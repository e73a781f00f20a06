"""A real Redis Cluster of primaries on loopback: one server process a node, one shard of the run on each."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from buffer.redis_scripts import shard_prefix
from buffer.redis_server import redis_executable

NUM_SLOTS = 16_384
_TRIES = 20


class Node:
    """One server of the cluster; its data is in its directory, and it can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        for _ in range(_TRIES):
            self.port = _free_port()
            self.process = self._start()
            if self._is_up():
                return
        raise AssertionError((directory / "redis.log").read_text())

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()
        assert self._is_up(), (self._directory / "redis.log").read_text()

    def _start(self) -> "subprocess.Popen[bytes]":
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": os.fspath(self._directory),
            "logfile": os.fspath(self._directory / "redis.log"),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "cluster-enabled": "yes",
            "cluster-node-timeout": "1000",
            "cluster-require-full-coverage": "no",
        }
        command = [redis_executable(), *(part for name, value in options.items() for part in (f"--{name}", value))]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _is_up(self) -> bool:
        """Wait until it answers; False when it ended, for example because its port was taken."""
        while self.process.poll() is None:
            try:
                self.client().ping()
            except redis.exceptions.ConnectionError:
                time.sleep(0.02)
            else:
                return True
        return False


class Cluster:
    """As many primaries as shards, without replicas: `nodes[k]` has shard k of the run."""

    def __init__(self, directory: Path, run_id: str, num_shards: int) -> None:
        directory.mkdir()
        self.nodes = [Node(directory / str(number)) for number in range(num_shards)]
        self.url = f"redis-cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"
        owners = {key_slot(shard_prefix(run_id, shard).encode()): shard for shard in range(num_shards)}
        assert len(owners) == num_shards
        for number, node in enumerate(self.nodes):
            slots = [slot for slot in range(NUM_SLOTS) if owners.get(slot, slot % num_shards) == number]
            command: Any = node.client().execute_command
            command("CLUSTER", "ADDSLOTS", *slots)
            command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        self.wait_until_formed()

    def wait_until_formed(self) -> None:
        """Wait until every node says that all slots are served."""
        deadline_s = time.monotonic() + 60
        while not all(_is_formed(node, len(self.nodes)) for node in self.nodes):
            assert time.monotonic() < deadline_s, "the nodes did not find each other"
            time.sleep(0.05)

    def close(self) -> None:
        _kill_all([node.process for node in self.nodes])


def _is_formed(node: Node, num_nodes: int) -> bool:
    fields: Any = node.client().cluster("info")
    wanted = {"cluster_state": "ok", "cluster_slots_ok": str(NUM_SLOTS), "cluster_known_nodes": str(num_nodes)}
    return {name: fields[name] for name in wanted} == wanted


def _free_port() -> int:
    """Return a port that is free, and so is the one of the cluster bus, 10,000 above."""
    while True:
        with socket.socket() as plain, socket.socket() as bus:
            plain.bind(("127.0.0.1", 0))
            port: int = plain.getsockname()[1]
            try:
                bus.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            return port


def _kill_all(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
