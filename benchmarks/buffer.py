"""The replay buffer's speed against the floor of raw Redis in the same run, and beside DeepMind's Reverb.

Everything of ours runs as the product does: `stalewise serve` on a Redis with an append-only file (everysec),
validation and idempotency on, unless a line says that something is off. Reverb runs in an environment of its own
(`make setup-reverb`). Cases are bounded in time; by default, without the table
of 1 M groups (--million), the whole takes under ten minutes.

On a machine with other jobs put it under real-time priority, or the jobs are what is measured.

Usage: [chrt -r 10] python -m benchmarks.buffer [--quick] [--million] [--reverb PYTHON] [--only insert,...]
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.replay.draws import draws
from benchmarks.replay.inserts import inserts
from benchmarks.replay.payloads import SIZES
from benchmarks.replay.prices import prices
from benchmarks.replay.product import product
from benchmarks.replay.samples import samples

CASES = ("reverb", "insert", "sample", "price", "draw")


def reverb(python: str, seconds: float) -> dict[int, dict[str, float]]:
    """Return Reverb's figures by KB of payload; {} without its environment."""
    if not Path(python).exists():
        print(f"no Reverb: {python} does not exist (make setup-reverb)")
        return {}
    script = Path(__file__).parent / "replay" / "reverb_peer.py"
    figures: dict[int, dict[str, float]] = {}
    for kb in SIZES:  # each in a process of its own: its client has hung for minutes when it was to connect
        command = [python, str(script), "--seconds", str(seconds), str(kb << 10)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"no Reverb at {kb} KB: {error}, {str(error.stderr)[-2000:]}")
        else:
            figures[kb] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run the cases and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short cases")
    parser.add_argument(
        "--million", action="store_true", help="draw from 1 M groups too: minutes more, to fill the table"
    )
    parser.add_argument("--reverb", default=".venv-reverb/bin/python", help="the interpreter that has dm-reverb")
    parser.add_argument("--only", default=",".join(CASES), help="cases, such as insert,draw")
    arguments = parser.parse_args()
    only, seconds = arguments.only.split(","), 0.7 if arguments.quick else 2.0
    started = time.monotonic()
    print(f"Python {platform.python_version()}, {platform.machine()}, {' '.join(sys.argv[1:])}")
    with product() as ours:
        print(f"Redis {ours.client.info('server')['redis_version']}")
        peer = reverb(arguments.reverb, seconds) if "reverb" in only else {}
        if "insert" in only:
            inserts(ours, peer, seconds)
        if "sample" in only:
            samples(ours, peer, seconds)
        if "price" in only:
            prices(ours, seconds)
        if "draw" in only:
            draws(ours, [1_000, 100_000, *([1_000_000] if arguments.million else [])], seconds)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
