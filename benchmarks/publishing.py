"""What a publication costs the learner: how long its step is held up, and how much memory it takes for the time.

    OMP_NUM_THREADS=1 python -m benchmarks.publishing --millions 100 1000

The real publisher sends float32 parameters, rounded to bfloat16, to a real service on loopback. Each version takes one
step of AdamW's size a value. Held up = until `Publisher.begin` returns; the rest happens in the background. Memory is
the highest resident size of the process above what it had before, less the one host copy of what is published; Linux
alone tells it. Each line comes from a process of its own: memory that one freed would hide what the next takes.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.weights import TENSOR_VALUES, serving
from buffer.client import HttpWeightStore
from buffer.connection import ServiceClient
from buffer.weights.manifest import Probe
from learner.publisher import Publisher
from learner.snapshot import RoundedTensors, Snapshot

PROBE = Probe(token_ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=0.1)
PIECE = 1 << 20


def make_weights(millions: int) -> dict[str, Tensor]:
    """Return float32 masters N(0, 0.02)."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, millions * 1_000_000 // TENSOR_VALUES)
    sizes = [min(TENSOR_VALUES, millions * 1_000_000)] * count
    return {f"layer.{i}": torch.empty(n).normal_(0.0, 0.02, generator=generator) for i, n in enumerate(sizes)}


def step(weights: dict[str, Tensor], rate: float, generator: torch.Generator) -> None:
    """Move every value as late AdamW steps do, in pieces: a step of its own would need memory of its own."""
    for tensor in weights.values():
        for piece in tensor.split(PIECE):
            piece.add_(torch.randn(len(piece), generator=generator), alpha=0.25 * rate)


def status_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(url: str, millions: int, rate: float, versions: int) -> None:
    """Publish a keyframe and some deltas, and print a line."""
    torch.set_num_threads(1)
    generator, weights = torch.Generator().manual_seed(1), make_weights(millions)
    dense = 2 * sum(len(tensor) for tensor in weights.values())
    client = ServiceClient(url)
    with ThreadPoolExecutor(1) as executor:
        publisher = Publisher(
            HttpWeightStore(client),
            run_id="run",
            model_fingerprint=f"{millions:064x}",
            keyframe_every=1_000,
            executor=executor,
            unix_time=time.time,
        )
        first = publisher.latest_version()
        rows = []
        for version in range(versions + 1):
            step(weights, rate, generator)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            before = status_bytes("VmRSS")
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            tensors = RoundedTensors.of(weights, "bfloat16")
            snapshot = Snapshot(specs=tensors.specs, tensors=tensors, probe=PROBE, adapter=None)
            publisher.begin(snapshot, version=version + (0 if first is None else first + 1))
            held_up_s, held_up_cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
            publisher.flush()
            assert publisher.sent is not None
            peak = status_bytes("VmHWM") - before - (0 if version else dense)
            rows.append((held_up_s, held_up_cpu_s, publisher.sent.seconds, peak, publisher.sent.payload_bytes))
    client.close()
    held_up_s, held_up_cpu_s, background_s, _, payload_bytes = np.median(rows[1:], axis=0)
    print(
        f"{millions} M, lr {rate:g}: a version is {payload_bytes / dense:.2%} of the model; held up"
        f" {1e3 * held_up_s:.0f} ms, CPU {1e3 * held_up_cpu_s:.0f} ms ({dense / 1e9 / held_up_cpu_s:.2f} GB/s);"
        f" background {1e3 * background_s:.0f} ms; most memory above the host copy"
        f" {max(row[3] for row in rows[1:]) / dense:.1%} of the model; the keyframe: held up {rows[0][0]:.1f} s,"
        f" background {rows[0][2]:.1f} s, memory {rows[0][3] / dense:.1%}",
        flush=True,
    )


def adamw_ms(millions: int) -> float:
    """Return the CPU time that an AdamW update of so many float32 parameters takes, without forward and backward."""
    weights = [tensor.requires_grad_() for tensor in make_weights(millions).values()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    times = []
    for _ in range(4):
        began_s = time.process_time()
        optimizer.step()
        times.append(time.process_time() - began_s)
    return 1e3 * min(times)


def main() -> None:
    """Measure every size at every rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[100], help="parameters of a model, in millions")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5], help="learning rates")
    parser.add_argument("--versions", type=int, default=5)
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    for millions in arguments.millions:
        for rate in arguments.rates:
            with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as url:
                child = processes.Process(target=measure, args=(url, millions, rate, arguments.versions))
                child.start()
                child.join()
    torch.set_num_threads(1)
    print(f"beside it, AdamW alone of 100 M float32 parameters: {adamw_ms(100):.0f} ms of CPU")


if __name__ == "__main__":
    main()
