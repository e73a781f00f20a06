"""The real `stalewise act` process against a real service."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from actor.decoding import Decoding
from actor.engine import GenerationRequest
from actor.tasks import Prompt, RunningSums
from actor.torch_engine import TorchEngine
from buffer.client import HttpTable, HttpWeightStore
from buffer.codec import decode_group
from buffer.connection import ServiceClient
from buffer.errors import InvalidSettings, RunMismatch, ServiceUnreachable, StalewiseError
from services.actor_service import abort_when_told, run_actor
from services.settings import load_config
from tests.actor.conftest import keyframes, model_dir, tokenizer
from tests.actor.publishing import publish
from tests.factories import RUN_ID, UNTRUNCATED
from tests.services.live import NO_RETRY, ServeProcess, make_context, serving, stalewise

__all__ = ["keyframes", "model_dir", "tokenizer"]  # fixtures

Process = subprocess.Popen[bytes]


def settings(runs_dir: Path, url: str, model_dir: Path, *more: str) -> list[str]:
    values = (f"service.url={url}", f"run.name={RUN_ID}", f"run.runs_dir={runs_dir}", f"run.model={model_dir}")
    actor = ("group_size=2", "groups_per_batch=2", "max_new_tokens=20", "retry_s=0.05", "heartbeat_s=0.1", "poll_s=1")
    return [*values, *(f"actor.{value}" for value in actor), *more]


@contextmanager
def acting(log_path: Path, values: list[str]) -> Iterator[Process]:
    """Run an actor; kill it if the test leaves it running."""
    options = [part for value in values for part in ("--set", value)]
    command = [sys.executable, "-m", "services.cli", "act", "--actor-id", "actor-0", *options]
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(reached: Callable[[], bool], process: Process, log_path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline_s, log_path.read_text()
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_an_actor_generates_beats_and_ends_on_sigterm(model_dir: Path, keyframes: list[Path], tmp_path: Path) -> None:
    log_path, context = tmp_path / "log", make_context(tmp_path / "service")
    with serving(context) as url, closing(ServiceClient(url, settings=NO_RETRY)) as client:
        store, table = HttpWeightStore(client), HttpTable(client)
        evaluation = [f"actor.evaluation.{value}" for value in ("every_updates=1", "num_prompts=3")]
        with acting(log_path, settings(tmp_path, url, model_dir, *evaluation)) as process:
            wait_for(lambda: [a["state"] for a in client.stats()["actors"]] == ["waiting_weights"], process, log_path)
            publish(store, model_dir, keyframes[0], 0)
            wait_for(lambda: table.stats().inserted_total >= 4, process, log_path)
            publish(store, model_dir, keyframes[1], 1)
            wait_for(lambda: client.stats()["actors"][0]["version"] == 1, process, log_path)
            wait_for(lambda: [a["state"] for a in client.stats()["actors"]] == ["waiting_admission"], process, log_path)

            process.send_signal(signal.SIGTERM)

            assert process.wait(20) == 0, log_path.read_text()
        assert not list((tmp_path / RUN_ID / "actors" / "actor-0" / "spool").glob("*.group"))
        assert set(table.stats().outcomes) <= {"accepted", "full"}
        evaluated = client.stats()["evaluations"]["results"]
        assert [(e["version"], e["newest_version"], e["actor_id"]) for e in evaluated] == [
            (0, 0, "actor-0"),
            (1, 1, "actor-0"),
        ]
        assert table.stats().num_eval == 6


@pytest.mark.timeout(240)  # four processes start, each imports torch
def test_groups_survive_a_killed_service_and_then_a_killed_actor(
    model_dir: Path, keyframes: list[Path], tmp_path: Path
) -> None:
    log_path, spool = tmp_path / "log", tmp_path / RUN_ID / "actors" / "actor-0" / "spool"
    service = ServeProcess(tmp_path, f"service.port={free_port()}", "limiter.error_buffer=1e6")
    try:
        url = service.wait_until_ready()
        values = settings(tmp_path, url, model_dir)
        with closing(ServiceClient(url, settings=NO_RETRY)) as client:
            publish(HttpWeightStore(client), model_dir, keyframes[0], 0)
            with acting(log_path, values) as process:
                wait_for(lambda: HttpTable(client).stats().inserted_total >= 4, process, log_path)
                service.process.kill()
                wait_for(lambda: len(list(spool.glob("*.group"))) >= 10, process, log_path)
        left = {decode_group(p.read_bytes(), max_bytes=1 << 20).group_id for p in spool.glob("*.group")}
        service.restart()

        with closing(ServiceClient(service.wait_until_ready(), settings=NO_RETRY)) as client:
            table = HttpTable(client)
            with acting(log_path, values) as process:
                wait_for(lambda: not list(spool.glob("*.group")), process, log_path)
                accepted = table.stats().inserted_total
                wait_for(lambda: table.stats().inserted_total > accepted, process, log_path)
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0, log_path.read_text()

            assert len(left) >= 10
            assert {table.get(group_id).group_id for group_id in left} == left
            assert set(table.stats().outcomes) <= {"accepted", "duplicate"}
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ("run.name=other", RunMismatch, "serves run test-run, but run.name is other"),
        ("run.model=nowhere", InvalidSettings, "nowhere is neither a local model directory nor"),
        ("actor.task.name=no_such", InvalidSettings, "'no_such' is neither running_sums nor"),
    ],
)
def test_an_actor_that_does_not_fit_the_run_says_why(
    change: str, error: type[StalewiseError], sentence: str, model_dir: Path, tmp_path: Path
) -> None:
    with serving(make_context(tmp_path / "service")) as url:
        config = load_config(None, overrides=settings(tmp_path, url, model_dir, change))

        with pytest.raises(error, match=sentence):
            run_actor(config, actor_id="a")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is not a model directory: it has no config.json"),
        ({"config.json": "{}"}, "holds no tokenizer that can be read: Couldn't instantiate the backend tokenizer"),
        ({"config.json": "{}", "tokenizer.json": "{"}, "holds no tokenizer that can be read: Expecting property name"),
    ],
)
def test_a_directory_without_a_model_is_one_sentence_before_anything_starts(
    files: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    config = load_config(None, overrides=settings(tmp_path, "http://127.0.0.1:9", model))

    with pytest.raises(InvalidSettings) as caught:
        run_actor(config, actor_id="a")

    assert caught.value.detail.startswith(f"{model} {sentence}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [model]


def test_an_unknown_engine_an_odd_id_and_an_absent_service_are_one_sentence_each(
    model_dir: Path, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    config = load_config(None, overrides=settings(tmp_path, url, model_dir, "client.retry_budget_s=0"))

    with pytest.raises(InvalidSettings, match="engine 'jax' is unknown"):
        run_actor(config, engine="jax")
    shipping = load_config(None, overrides=settings(tmp_path, url, model_dir, "actor.ship_distributions=true"))
    with pytest.raises(InvalidSettings, match="engine vllm reports the log-probs of a few ids alone"):
        run_actor(shipping, engine="vllm")
    several = load_config(None, overrides=settings(tmp_path, url, model_dir, "actor.batches_in_flight=2"))
    with pytest.raises(InvalidSettings, match="batches_in_flight=2, but engine torch draws one batch at a time"):
        run_actor(several)
    with pytest.raises(ServiceUnreachable, match="no answer from"):
        run_actor(config)
    with serving(make_context(tmp_path / "service")) as url:
        config = load_config(None, overrides=settings(tmp_path, url, model_dir))
        with pytest.raises(InvalidSettings, match=r"actor id '\.\./a' is not a plain name"):
            run_actor(config, actor_id="../a")


def test_the_sampling_of_evaluations_is_checked_at_start_too(model_dir: Path, tmp_path: Path) -> None:
    cold = (f"sampling.{value}" for value in ("temperature=0.001", "top_p=1", "top_k=0", "min_p=0"))
    evaluation = [f"actor.evaluation.{value}" for value in ("every_updates=1", *cold)]
    with serving(make_context(tmp_path / "service")) as url:
        config = load_config(None, overrides=settings(tmp_path, url, model_dir, *evaluation))

        with pytest.raises(InvalidSettings, match=r"actor\.evaluation\.sampling\.temperature=0\.001 is below 0\.01"):
            run_actor(config, actor_id="a", engine="vllm")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["actor.engine=torch"], "keeps a vLLM server at the newest version, and none is named"),
        (["actor.engine=vllm"], "keeps a vLLM server at the newest version, and none is named"),
        (
            ["actor.engine=vllm", "actor.vllm.url=http://127.0.0.1:9", "actor.vllm.lora_rank=8"],
            r"does not go with actor\.vllm\.lora_rank=8",
        ),
    ],
)
def test_following_for_agents_needs_a_server_and_whole_weights(
    model_dir: Path, tmp_path: Path, more: list[str], sentence: str
) -> None:
    config = load_config(None, overrides=settings(tmp_path, "http://127.0.0.1:9", model_dir, *more))

    with pytest.raises(InvalidSettings, match=sentence):
        run_actor(config, follow_only=True)


class JudgedLate(RunningSums):
    """A task whose judge never answers in time."""

    def reward(self, prompt: Prompt, response_ids: npt.NDArray[np.int32]) -> float:
        time.sleep(0.05)
        raise TimeoutError("no verdict within 50 ms")


def test_an_actor_without_rewards_is_shown_and_ends_with_a_sentence(
    model_dir: Path, keyframes: list[Path], tmp_path: Path
) -> None:
    log_path, context = tmp_path / "log", make_context(tmp_path / "service")
    task = ["actor.task.name=tests.services.test_actor_service:JudgedLate", "actor.task.max_unscored_groups=20"]
    with serving(context) as url, closing(ServiceClient(url, settings=NO_RETRY)) as client:
        publish(HttpWeightStore(client), model_dir, keyframes[0], 0)
        with acting(log_path, settings(tmp_path, url, model_dir, *task)) as process:
            wait_for(lambda: any(a["unscored_groups_total"] for a in client.stats()["actors"]), process, log_path)

            assert process.wait(20) == 1

    *_, last = log_path.read_text().splitlines()
    assert last.startswith("stalewise: 20 groups in a row could not be scored: the reward of prompt running_sums:")
    assert "raised TimeoutError at test_actor_service.py:" in last
    assert "Traceback" not in log_path.read_text()


def test_a_generation_that_begins_just_after_a_stop_is_ended_too(model_dir: Path, keyframes: list[Path]) -> None:
    class Slow(TorchEngine):
        """5 ms a step; tells of each abort."""

        aborted = threading.Event()

        def _step(self, decoding: Decoding) -> None:
            time.sleep(0.005)
            super()._step(decoding)

        def abort(self) -> None:
            super().abort()
            self.aborted.set()

    engine, stop, ended = Slow(model_dir, seed=0), threading.Event(), threading.Event()
    engine.load(keyframes[0], 0)
    request = GenerationRequest(prompt_ids=np.array([3, 4], np.int32), sampling=UNTRUNCATED, max_new_tokens=120)
    aborting = threading.Thread(target=abort_when_told, args=(engine, stop, ended))
    aborting.start()
    stop.set()
    assert engine.aborted.wait(10)

    completions = engine.generate([request] * 64)

    ended.set()
    aborting.join()
    assert "abort" in {completion.finish_reason for completion in completions}


def test_the_command_ends_with_code_2_on_a_wrong_run(model_dir: Path, tmp_path: Path) -> None:
    with serving(make_context(tmp_path / "service")) as url:
        options = [p for value in settings(tmp_path, url, model_dir, "run.name=other") for p in ("--set", value)]

        ended = stalewise("act", *options)

    assert ended.returncode == 2
    assert "but run.name is other" in ended.stderr
    assert "Traceback" not in ended.stderr
