"""torchrun over tests.distributed.run, from a test."""

import json
import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(
    model_dir: Path, run_dir: Path, first: int, last: int, *flags: str, timeout_s: float = 300
) -> list[dict[str, float]]:
    """Do the updates [first, last) on two gloo ranks, and return their metrics."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.distributed.run"]
    arguments = [str(model_dir), str(run_dir), str(first), str(last), *flags]
    ended = subprocess.run(
        [sys.executable, *command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    measured: list[dict[str, float]] = json.loads((run_dir / "metrics.json").read_text())
    return measured
