"""`stalewise learn` under torchrun: two gloo ranks on the CPU against the real service with its own Redis."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ServiceClient
from buffer.rate_limiter import RateLimiterSettings
from buffer.weights.follower import Follower
from buffer.weights.manifest import Manifest, Payload
from services.learner_service import run_learner
from services.settings import load_config
from tests.factories import RUN_ID
from tests.learner.builders import plain_samples, save_tiny_model
from tests.services.live import ServeProcess, make_context, serving, stalewise

NOT_COMPARED = ("time/", "reference/cache_", "publish/", "reuse/")
"""Clocks, and what hangs on how fast a version was sent or a batch drawn."""


LIMITER = RateLimiterSettings(samples_per_insert=100_000, min_size=4, error_buffer=1_000_000)


def _options(runs_dir: Path, model_dir: Path, *more: str) -> list[str]:
    values = [
        f"run.name={RUN_ID}",
        f"run.runs_dir={runs_dir}",
        f"run.model={model_dir}",
        "learner.groups_per_update=4",
        "learner.selector.kind=fifo",
        "learner.micro_batch_tokens=24",
        "learner.checkpoint_every=2",
        "learner.keyframe_every=3",
        "learner.publish_dtype=bfloat16",
        "learner.prefetch_batches=0",
        "learner.max_closed_updates=1000000",
        "learner.optimizer.lr=1e-3",
        "learner.optimizer.warmup_updates=0",
        *more,
    ]
    return [part for value in values for part in ("--set", value)]


class Ranks:
    """torchrun with two learners, killed with them if the test leaves it running."""

    def __init__(self, log_path: Path, options: list[str]) -> None:
        self.log_path = log_path
        script = str(Path(sys.executable).with_name("stalewise"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, script, "learn", *options, "--resume"],
                stdout=log,
                stderr=log,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            )

    def pids(self) -> list[int]:
        """The ranks, in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(pid for pid in map(int, children) if b"learn" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 200
        while not reached():
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline_s, self.log_path.read_text()
            time.sleep(0.05)


@contextmanager
def _on_two_ranks(log_path: Path, options: list[str]) -> Iterator[Ranks]:
    ranks = Ranks(log_path, options)
    try:
        yield ranks
    finally:
        ranks.process.kill()  # the kernel ends the ranks with it
        ranks.process.wait()


def _wait_until_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 60
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s, pids
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _latest(client: ServiceClient) -> int:
    return client.run_info().latest_version


def _insert(client: ServiceClient) -> None:
    groups = [sample.group for sample in (*plain_samples(0), *plain_samples(1))]
    assert {result.outcome.value for result in HttpTable(client).insert(groups)} == {"accepted"}


def _updates_of(runs_dir: Path) -> list[dict[str, float]]:
    path = runs_dir / RUN_ID / "learner" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _saved_updates(runs_dir: Path) -> int:
    checkpoints = (runs_dir / RUN_ID / "learner" / "checkpoints").glob("update-*")
    return max(int(path.name.removeprefix("update-")) for path in checkpoints)


def _alone(model_dir: Path, runs_dir: Path, *, updates: int) -> list[dict[str, float]]:
    """Return the metrics of one process that is given the same groups by a service of its own."""
    runs_dir.mkdir()
    with serving(make_context(runs_dir / "service", limiter=LIMITER)) as url, closing(ServiceClient(url)) as client:

        def feed() -> None:
            while _latest(client) < 0:
                time.sleep(0.02)
            _insert(client)

        feeder = threading.Thread(target=feed)
        feeder.start()
        options = _options(runs_dir, model_dir, f"service.url={url}", f"learner.total_updates={updates}")
        run_learner(load_config(None, overrides=options[1::2]), resume=False)
        feeder.join()
    return _updates_of(runs_dir)


def _assert_same(of_one: dict[str, float], of_two: dict[str, float]) -> None:
    assert of_one.keys() - {"publish/payload_bytes", "publish/background_s"} <= of_two.keys()
    for name in [name for name in of_one if not name.startswith(NOT_COMPARED)]:
        assert of_two[name] == pytest.approx(of_one[name], rel=2e-3, abs=2e-5), name


def _assert_whole_and_shared(store: HttpWeightStore, model_dir: Path, directory: Path) -> Manifest:
    """Fetch the latest version as an actor does: it passes the canary, and two ranks have sent about half each."""
    manifest = store.latest()
    assert manifest is not None
    steps: dict[tuple[str, int], list[Payload]] = {}
    for payload in manifest.payloads:
        steps.setdefault((payload.kind, payload.version), []).append(payload)
    keyframes = next(parts for (kind, _), parts in steps.items() if kind == "keyframe")
    assert len(keyframes) == 2
    assert max(part.size_bytes for part in keyframes) < 2 * min(part.size_bytes for part in keyframes)
    directory.mkdir()
    mirror, _ = Follower(store, directory).follow(manifest)
    assert mirror.path is not None
    (directory / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    mirror.path.rename(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(manifest.probe.token_ids.astype("int64"))
    with torch.no_grad():
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(logprobs, torch.tensor(manifest.probe.logprobs), atol=1e-5, rtol=0)
    return manifest


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServeProcess]:
    limiter = [f"limiter.{name}={value}" for name, value in LIMITER.model_dump().items()]
    process = ServeProcess(tmp_path, "learner.groups_per_update=4", *limiter)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@pytest.mark.timeout(900)
def test_two_ranks_learn_over_http_are_killed_go_on_stop_and_are_followed_by_one(
    model_dir: Path, tmp_path: Path, service: ServeProcess
) -> None:
    expected, log_path = _alone(model_dir, tmp_path / "alone", updates=3), tmp_path / "log"
    client = ServiceClient(service.wait_until_ready())
    store = HttpWeightStore(client)
    options = _options(tmp_path, model_dir, "learner.total_updates=100000")

    with _on_two_ranks(log_path, options) as ranks:
        ranks.wait_for(lambda: _latest(client) == 0)
        _insert(client)
        ranks.wait_for(lambda: _latest(client) >= 8)
        pids = ranks.pids()
        ranks.process.send_signal(signal.SIGKILL)
        ranks.process.wait()
    _wait_until_gone(pids)
    killed_at = _latest(client)
    for of_one, of_two in zip(expected, _updates_of(tmp_path), strict=False):
        _assert_same(of_one, of_two)
    _assert_whole_and_shared(store, model_dir, tmp_path / "first")

    with _on_two_ranks(log_path, options) as ranks:
        ranks.wait_for(lambda: _latest(client) >= killed_at + 5)
        pids = ranks.pids()
        ranks.process.terminate()
        ranks.process.wait(120)
    _wait_until_gone(pids)
    ended = _updates_of(tmp_path)[-1]
    assert (_saved_updates(tmp_path), _latest(client)) == (ended["updates"], ended["version"]), log_path.read_text()
    manifest = _assert_whole_and_shared(store, model_dir, tmp_path / "second")

    end = f"learner.total_updates={_saved_updates(tmp_path) + 1}"
    one = stalewise("learn", *_options(tmp_path, model_dir, end), "--resume", timeout_s=200)
    assert one.returncode == 0, one.stderr
    assert _latest(client) == manifest.version + 2
    assert store.manifest(manifest.version + 1).checksum == manifest.checksum  # what two saved, one has
    client.close()


@pytest.mark.timeout(900)
def test_a_rank_that_dies_ends_all_and_a_service_that_stays_away_costs_no_work(
    model_dir: Path, tmp_path: Path, service: ServeProcess
) -> None:
    log_path = tmp_path / "log"
    client = ServiceClient(service.wait_until_ready())
    more = ["learner.total_updates=100000", "learner.checkpoint_every=100000", "client.retry_budget_s=2"]
    options = _options(tmp_path, model_dir, *more)
    with _on_two_ranks(log_path, options) as ranks:
        ranks.wait_for(lambda: _latest(client) == 0)
        pids = ranks.pids()
        os.kill(pids[0], signal.SIGKILL)  # while it waits for data
        assert ranks.process.wait(120) != 0
    _wait_until_gone(pids)
    assert "stalewise: rank 1 ends: the first rank is gone" in log_path.read_text()

    _insert(client)
    with _on_two_ranks(log_path, options) as ranks:
        ranks.wait_for(lambda: len(_updates_of(tmp_path)) >= 3)
        pids = ranks.pids()
        os.kill(pids[1], signal.SIGKILL)  # while both train
        assert ranks.process.wait(120) != 0
    _wait_until_gone(pids)

    before = len(_updates_of(tmp_path))
    with _on_two_ranks(log_path, options) as ranks:
        ranks.wait_for(lambda: len(_updates_of(tmp_path)) >= before + 3)
        pids = ranks.pids()
        service.process.kill()
        assert ranks.process.wait(120) != 0
    _wait_until_gone(pids)
    assert _saved_updates(tmp_path) == _updates_of(tmp_path)[-1]["updates"]
    client.close()
