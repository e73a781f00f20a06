"""DeepMind's Reverb on payloads of a given size. Runs in Reverb's own environment and prints one line of JSON.

Server and client are two processes, as ours are. Prioritized table, one item a step, `flush` with 200 in flight;
batches of 256 by `client.sample` and by the prefetching `TrajectoryDataset`. Payloads are random bytes, since Reverb
compresses.

Usage: reverb_peer.py [--seconds 2] BYTES
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import reverb
import tensorflow as tf

BATCH = 256
SERVER = """
import reverb, sys
table = reverb.Table(name="t", sampler=reverb.selectors.Prioritized(1.0), remover=reverb.selectors.Fifo(),
                     max_size=int(sys.argv[1]), rate_limiter=reverb.rate_limiters.MinSize(1))
server = reverb.Server(tables=[table])
print("port", server.port, flush=True)
sys.stdin.read()
"""


def measure(size: int, seconds: float) -> dict[str, float]:
    """Return items/s of inserts and the times of a batch for items of `size` bytes."""
    num_stored = max(1000, min(20_000, (200 << 20) // size))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(num_stored)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = next(line.split()[1] for line in server.stdout if line.startswith("port"))
        address = f"localhost:{port}"
        client = reverb.Client(address)
        result = {"insert_per_s": insert(client, size, num_stored, seconds)}
        times = batches(client.sample("t", BATCH, emit_timesteps=False) for _ in endless(seconds))
        result |= {"sample_p50_ms": percentile(times, 50), "sample_p99_ms": percentile(times, 99)}
        result["dataset_ms"] = dataset(address, seconds)
    finally:
        server.kill()
        server.wait()
    return result


def endless(seconds: float):
    """Yield until the time is over."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield


def insert(client: reverb.Client, size: int, at_least: int, seconds: float) -> float:
    """Return items/s; the first `at_least` fill the table and are not counted unless time is short."""
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 256, size, np.uint8) for _ in range(64)]
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:

        def write(number: int) -> None:
            writer.append(items[number % 64])
            writer.create_item("t", 1.0 + number % 7, writer.history[-1:])
            writer.flush(200)

        for number in range(at_least):
            write(number)
        writer.flush()
        start, number = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            write(number)
            number += 1
        writer.flush()
        return number / (time.perf_counter() - start)


def batches(draws) -> list[float]:
    """Return the milliseconds of each draw, read to its end."""
    times, start = [], time.perf_counter()
    for draw in draws:
        assert sum(1 for _ in draw) == BATCH
        now = time.perf_counter()
        times.append(1000 * (now - start))
        start = now
    return times[1:] or times


def dataset(address: str, seconds: float) -> float:
    """Return the milliseconds per batch of the prefetching dataset, read back to back."""
    items = reverb.TrajectoryDataset(
        server_address=address,
        table="t",
        dtypes=(tf.uint8,),
        shapes=(tf.TensorShape([None, None]),),
        max_in_flight_samples_per_worker=2 * BATCH,
    )
    iterator = items.batch(BATCH).prefetch(2).as_numpy_iterator()
    next(iterator)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(iterator)
        count += 1
    return 1000 * (time.perf_counter() - start) / count


def percentile(times: list[float], percent: float) -> float:
    """Return a percentile."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("size", type=int, metavar="BYTES")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.size, arguments.seconds)))


if __name__ == "__main__":
    main()
