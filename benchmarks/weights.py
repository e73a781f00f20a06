"""Weight deltas beside the codecs that other stacks use, on the same tensors in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks.weights --millions 10 100

A model of bf16 values rounded from float32 masters N(0, 0.02) takes one step of lr * 0.25 * N(0, 1) a value, the spread
of late AdamW steps. Codec times are CPU seconds of one thread, HTTP ones wall time; the best of the repeats.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zstandard

from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.weights.delta import write_delta
from buffer.weights.manifest import Payload
from buffer.weights.mirror import Mirror
from buffer.weights.tensors import HostTensor, TensorSpec
from services.address import read_address
from tests.deltas import delta_between

TENSOR_VALUES = 5_000_000
RATES = (4e-7, 1e-6, 3e-6, 1e-5)


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even bfloat16, as bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def versions(millions: int, rate: float) -> tuple[dict[str, HostTensor], dict[str, HostTensor]]:
    """Return a model and its next version."""
    rng = np.random.default_rng(0)
    old, new = {}, {}
    for number in range(max(1, millions * 1_000_000 // TENSOR_VALUES)):
        size = min(TENSOR_VALUES, millions * 1_000_000)
        master = rng.standard_normal(size, np.float32) * np.float32(0.02)
        spec = TensorSpec(name=f"layer.{number}", dtype="BF16", shape=(size,))
        old[spec.name] = HostTensor(spec, bf16(master))
        master += rng.standard_normal(size, np.float32) * np.float32(0.25 * rate)
        new[spec.name] = HostTensor(spec, bf16(master))
    return old, new


def cpu_s(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of some runs."""
    times = []
    for _ in range(repeats):
        began_s = time.process_time()
        work()
        times.append(time.process_time() - began_s)
    return min(times)


def entropy_bytes(old: dict[str, HostTensor], new: dict[str, HostTensor]) -> float:
    """Return the bound for independent positions and steps: what no codec that knows no more can go below."""
    steps: list[np.ndarray] = []
    total = 0
    for name, tensor in old.items():
        at = np.flatnonzero(tensor.bits != new[name].bits)
        steps.append(new[name].bits[at].astype(np.int64) - tensor.bits[at])
        total += len(tensor.bits)
    all_steps = np.concatenate(steps)
    share = len(all_steps) / total
    counts = np.unique(all_steps, return_counts=True)[1] / len(all_steps)
    positions = -total * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return float(positions - len(all_steps) * (counts * np.log2(counts)).sum()) / 8


def other_codecs(old: dict[str, HostTensor], new: dict[str, HostTensor]) -> dict[str, int]:
    """Return the bytes that other codecs need."""
    zstd = zstandard.ZstdCompressor(level=1)
    sizes = {"XOR + zstd-1": 0, "u16 gaps + bf16": 0, "int32 + bf16": 0, "zstd-1 of the file": 0}
    for name, tensor in old.items():
        bits = new[name].bits
        at = np.flatnonzero(tensor.bits != bits)
        escapes = int((np.diff(at, prepend=-1) >> 16).astype(bool).sum())
        sizes["XOR + zstd-1"] += len(zstd.compress((tensor.bits ^ bits).data))
        sizes["u16 gaps + bf16"] += 4 * len(at) + 4 * escapes
        sizes["int32 + bf16"] += 6 * len(at)
        sizes["zstd-1 of the file"] += len(zstd.compress(bits.data))
    return sizes


def measure(millions: int, rate: float, repeats: int) -> None:
    """Print one row for a size and a learning rate."""
    old, new = versions(millions, rate)
    dense = sum(tensor.spec.num_bytes for tensor in old.values())
    changed = sum(int((tensor.bits != new[name].bits).sum()) for name, tensor in old.items())
    content = b"".join(delta_between(old, new, base_version=0, version=1))
    take_over_s, pack_s = publishing_s(old, new, repeats)
    apply_times = []
    for _ in range(repeats):
        mirror = Mirror.allocate(tensor.spec for tensor in old.values())
        mirror.advance(old.values(), 0)
        began_s = time.process_time()
        mirror.apply([[content]], base_version=0, version=1)
        apply_times.append(time.process_time() - began_s)
        assert all((mirror.tensors[name].bits == tensor.bits).all() for name, tensor in new.items())
    copy_s = cpu_s(lambda: [tensor.bits.copy() for tensor in new.values()], repeats)
    others = other_codecs(old, new)
    print(
        f"{millions} M, lr {rate:g}: {100 * changed / (dense // 2):.2f} % changed, {len(content)} bytes,"
        f" {len(content) / changed:.2f} a changed value, {dense / len(content):.0f}x smaller than dense,"
        f" {len(content) / entropy_bytes(old, new):.2f} of the entropy bound; encode"
        f" {dense / 1e9 / (take_over_s + pack_s):.2f} GB/s"
        f" (compare and hash {dense / 1e9 / take_over_s:.2f}, pack {dense / 1e9 / pack_s:.2f}),"
        f" apply {dense / 1e9 / min(apply_times):.2f} GB/s, memcpy {dense / 1e9 / copy_s:.2f} GB/s; "
        + ", ".join(f"{name} {size / len(content):.2f}x" for name, size in others.items()),
        flush=True,
    )


def publishing_s(old: dict[str, HostTensor], new: dict[str, HostTensor], repeats: int) -> tuple[float, float]:
    """Return a publisher's CPU times: to take a version over, which compares and hashes, and to pack its changes."""
    mirror = Mirror.allocate(tensor.spec for tensor in old.values())
    mirror.advance(old.values(), 0)
    take_over, pack = [], []
    for version in range(1, 2 * repeats + 1):
        began_s = time.process_time()
        changes = mirror.advance((new if version % 2 else old).values(), version)
        taken_s = time.process_time()
        sum(map(len, write_delta(version - 1, version, changes)))
        take_over.append(taken_s - began_s)
        pack.append(time.process_time() - taken_s)
    return min(take_over), min(pack)


def measure_http(millions: int, repeats: int) -> None:
    """Print how fast a keyframe goes up to a real service and comes back over one connection, proof included."""
    old, _ = versions(millions, RATES[0])
    mirror = Mirror.allocate(tensor.spec for tensor in old.values())
    mirror.advance(old.values(), 0)
    digest = hashlib.sha256()
    for chunk in mirror.keyframe():
        digest.update(chunk)
    payload = Payload(kind="keyframe", version=0, sha256=digest.hexdigest(), size_bytes=mirror.num_bytes)
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as url:
        client = ServiceClient(url, settings=ClientSettings(download_connections=1))
        store = HttpWeightStore(client)
        path = Path(directory) / "mirror"
        began_s = time.perf_counter()
        store.put_blob(payload.sha256, [bytes(chunk) for chunk in mirror.keyframe()])
        upload_s = time.perf_counter() - began_s
        download_s, proof_s = [], []
        for _ in range(repeats):
            began_s = time.perf_counter()
            store.download(payload, path)
            download_s.append(time.perf_counter() - began_s)
            assert Mirror.open(path, 0).checksum == mirror.checksum
            proof_s.append(time.perf_counter() - began_s)
        client.close()
    print(
        f"{millions} M over HTTP: up {mirror.num_bytes / 1e9 / upload_s:.2f} GB/s, down"
        f" {mirror.num_bytes / 1e9 / min(download_s):.2f} GB/s, with the proof"
        f" {mirror.num_bytes / 1e9 / min(proof_s):.2f} GB/s",
        flush=True,
    )


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Run `stalewise serve` in a directory of its own."""
    options = ["--set", f"run.runs_dir={directory}", "--set", "service.port=0"]
    process = subprocess.Popen([sys.executable, "-m", "services.cli", "serve", *options], stderr=subprocess.DEVNULL)
    try:
        while (url := read_address(directory / "run")) is None:
            assert process.poll() is None, "the service did not start"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure every size at every rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 100], help="parameters of a model, in millions")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for millions in arguments.millions:
        for rate in RATES:
            measure(millions, rate, arguments.repeats)
        measure_http(millions, arguments.repeats)


if __name__ == "__main__":
    main()
