"""The replay buffer's speed against the floor of raw Redis in the same run, and beside DeepMind's Reverb.

Everything of ours runs as the product does: `stalewise serve` on a Redis with an append-only file (everysec),
validation and idempotency on, unless a line says that something is off. Reverb runs in an environment of its own
(`make setup-reverb`). Cases are bounded in time; the whole takes under ten minutes, --quick about two.

On a machine with other jobs put it under real-time priority, or the jobs are what is measured.

Usage: [chrt -r 10] python -m benchmarks.buffer [--quick] [--reverb .venv-reverb/bin/python] [--only insert,...]
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    sizes = [str(kb << 10) for kb in SIZES]
    ran = subprocess.run(
        [python, str(script), "--seconds", str(seconds), *sizes], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        print(f"no Reverb: {ran.stderr[-2000:]}")
        return {}
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {int(size) >> 10: figure for size, figure in figures.items()}


def main() -> None:
    """Run the cases and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short cases, no table of 1 M groups")
    parser.add_argument("--reverb", default=".venv-reverb/bin/python", help="the interpreter that has dm-reverb")
    parser.add_argument("--only", default=",".join(CASES), help="cases, such as insert,draw")
    arguments = parser.parse_args()
    only, seconds = arguments.only.split(","), 0.7 if arguments.quick else 2.0
    started = time.monotonic()
    print(f"Python {platform.python_version()}, {platform.machine()}, {' '.join(sys.argv[1:])}")
    with product(num_services=2) as ours:
        print(f"Redis {ours.client.info('server')['redis_version']}")
        peer = reverb(arguments.reverb, seconds) if "reverb" in only else {}
        if "insert" in only:
            inserts(ours, peer, seconds)
        if "sample" in only:
            samples(ours, peer, seconds)
        if "price" in only:
            prices(ours, seconds)
        if "draw" in only:
            draws(ours, [1_000, 100_000] if arguments.quick else [1_000, 100_000, 1_000_000], seconds)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
