"""A real nginx for the length of a test."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_nginx(conf: str, directory: Path, port: int) -> Iterator[None]:
    """Run a configuration that listens on a port of loopback, in a directory of its own."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if program is None:
        if os.environ.get("STALEWISE_NEEDS_NGINX"):
            pytest.fail("nginx is not installed, and this run must test it")
        pytest.skip("nginx is not installed: `make test-nginx` insists on it")
    user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers cannot enter the test's directory
    (directory / "nginx.conf").write_text(f"{user}daemon off;\n{conf}")
    process = subprocess.Popen([program, "-p", directory, "-c", "nginx.conf"], stderr=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.communicate()
