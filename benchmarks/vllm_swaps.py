"""Weight swaps under load in vLLM: how long a load pauses generation, in process or on a server.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_swaps --mode remote --swaps 24

Requests run all the time; every version is fetched while they run, by delta, and loaded in mid-generation.
"""

import argparse
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from actor.engine import Completion, GenerationRequest
from actor.settings import VllmSettings
from actor.vllm.engine import VllmEngine
from actor.vllm.fetching import WeightSource
from actor.vllm.remote import RemoteVllmEngine
from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from tests.factories import UNTRUNCATED
from tests.vllm.conftest import Policies, Served, make_policies, replay_service, vllm_server

NUM_REQUESTS, NEW_TOKENS = 16, 100


class Load:
    """Generates without an end, and keeps what was drawn."""

    def __init__(self, engine: VllmEngine | RemoteVllmEngine) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self.requests = [
            GenerationRequest(
                prompt_ids=np.array([2 + i, 11, 7], np.int32), sampling=UNTRUNCATED, max_new_tokens=NEW_TOKENS
            )
            for i in range(NUM_REQUESTS)
        ]
        self.drawn: list[list[Completion]] = []
        self.num_sent = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.num_sent += len(self.requests)
            self.drawn.append(self._engine.generate(self.requests))


def step_s(engine: VllmEngine | RemoteVllmEngine, requests: list[GenerationRequest]) -> float:
    """Return the length of a decode step without swaps: the longest response takes as many."""
    took = []
    for _ in range(5):
        began_s = time.monotonic()
        drawn = engine.generate(requests)
        took.append((time.monotonic() - began_s) / max(len(completion.response_ids) for completion in drawn))
    return statistics.median(took)


def worst_nats(policies: Policies, load: Load) -> tuple[float, float, int]:
    """Return mean and largest difference from a recomputation under the versions of the spans, and the tokens."""
    differences = [
        np.abs(completion.behavior_logprobs - policies.recompute(request.prompt_ids, completion, 1.0))
        for batch in load.drawn
        for request, completion in zip(load.requests, batch, strict=True)
    ]
    together = np.concatenate(differences)
    return float(together.mean()), float(together.max()), len(together)


def measure(served: Served, swaps: int) -> None:
    """Swap versions under load, and print what that took."""
    held = served.publish(parity=0)
    served.take(held)
    with Load(served.engine) as load:
        pass  # the first batch of every shape costs seconds
    step = step_s(served.engine, load.requests)
    pauses, fetches = [], []
    with Load(served.engine) as load:
        for number in range(1, swaps + 1):
            held = served.publish_delta(held, parity=number % 2) if number % 8 else served.publish(parity=number % 2)
            began_s = time.monotonic()
            served.engine.fetch(held)
            fetches.append(time.monotonic() - began_s)
            served.engine.load(held)
            pauses.append(served.engine.pause_s)
    num_drawn = sum(map(len, load.drawn))
    mean, worst, tokens = worst_nats(served.policies, load)
    pauses_ms, quantiles = [1e3 * pause for pause in pauses], statistics.quantiles(pauses, n=10)
    print(f"decode step of {NUM_REQUESTS} requests: {1e3 * step:.1f} ms (median)")
    print(
        f"pause: median {statistics.median(pauses_ms):.1f} ms, best {min(pauses_ms):.1f}, p90 {1e3 * quantiles[8]:.1f}"
    )
    print(f"fetch before the pause: median {1e3 * statistics.median(fetches):.1f} ms")
    print(f"requests: {load.num_sent} sent, {num_drawn} answered in full")
    print(f"log-probs of {tokens} tokens: mean {mean:.2g}, largest {worst:.2g} nats from a recomputation")


def main() -> None:
    """Start everything, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["process", "remote"], required=True)
    parser.add_argument("--swaps", type=int, default=30)
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        policies = make_policies((directory / "policy0", directory / "policy1"), tied=True)
        model_dir, settings = policies.directories[0], VllmSettings(dtype="float32")
        url = stack.enter_context(replay_service(directory, model_dir, {}))
        client = ServiceClient(url, settings=ClientSettings())
        stack.callback(client.close)
        engine: VllmEngine | RemoteVllmEngine
        if options.mode == "remote":
            remote = stack.enter_context(vllm_server(directory, model_dir, settings))
            engine = RemoteVllmEngine(model_dir, remote, sampling=UNTRUNCATED, source=WeightSource(url))
        else:
            engine = VllmEngine(model_dir, settings, sampling=UNTRUNCATED, seed=7, source=WeightSource(url))
        measure(Served(engine, HttpWeightStore(client), policies, directory), options.swaps)


if __name__ == "__main__":
    main()
