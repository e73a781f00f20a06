"""The real `stalewise learn` process against a real service."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import safetensors.torch

from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import InvalidSettings, RunMismatch, ServiceUnreachable, StalewiseError
from buffer.evaluations import EvaluationClaim
from buffer.evaluations_client import HttpEvaluations
from buffer.fingerprint import model_fingerprint
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import Wait
from buffer.wire import LearnerReport
from learner.collate import collate
from learner.distributed import ALONE, Ranks
from learner.run_log import RunLog
from learner.step import Progress
from services.learner_service import MAX_PENDING_REPORTS, ServiceReporter, check_ranks, run_learner
from services.settings import RunConfig, load_config
from tests.factories import RUN_ID, make_group
from tests.learner.builders import make_trainer, plain_samples, save_tiny_model
from tests.learner.documented import undocumented
from tests.services.live import NO_RETRY, PublishingTable, ServeProcess, make_context, serving, stalewise
from tests.services.test_evaluations import result

GENEROUS = RateLimiterSettings(samples_per_insert=1_000, min_size=2, error_buffer=10_000)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory


def _values(runs_dir: Path, url: str, model_dir: Path, *more: str) -> list[str]:
    return [
        f"service.url={url}",
        f"run.name={RUN_ID}",
        f"run.runs_dir={runs_dir}",
        f"run.model={model_dir}",
        "learner.groups_per_update=2",
        "learner.selector.kind=uniform",
        "learner.checkpoint_every=2",
        "learner.optimizer.warmup_updates=0",
        *more,
    ]


def _options(runs_dir: Path, url: str, model_dir: Path, *more: str) -> list[str]:
    return [part for value in _values(runs_dir, url, model_dir, *more) for part in ("--set", value)]


def _config(runs_dir: Path, url: str, model_dir: Path, *more: str) -> RunConfig:
    return load_config(None, overrides=_values(runs_dir, url, model_dir, *more))


@contextmanager
def _learning(log_path: Path, options: list[str], *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a learner; kill it if the test leaves it running."""
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "learn", *options, *flags], stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(reached: Callable[[], bool], process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline_s = time.monotonic() + 100
    while not reached():
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline_s, log_path.read_text()
        time.sleep(0.02)


def _insert(client: ServiceClient) -> None:
    results = HttpTable(client).insert([make_group(f"g{number}") for number in range(3)])
    assert {result.outcome.value for result in results} == {"accepted"}


@pytest.mark.timeout(240)  # two starts of a real process, on a machine that may be busy
def test_a_learner_trains_over_http_is_killed_resumes_and_ends(model_dir: Path, tmp_path: Path) -> None:
    log_path, learner_dir = tmp_path / "log", tmp_path / RUN_ID / "learner"
    with serving(make_context(tmp_path / "service", limiter=GENEROUS)) as url:
        client = ServiceClient(url, settings=NO_RETRY)
        store = HttpWeightStore(client)

        def latest() -> int:
            manifest = store.latest()
            return -1 if manifest is None else manifest.version

        options = _options(tmp_path, url, model_dir, "learner.total_updates=100000")
        with _learning(log_path, options, "--resume") as process:  # the command that a preempted run goes on with
            _wait_for(lambda: latest() == 0, process, log_path)
            _insert(client)
            _wait_for(lambda: latest() >= 5, process, log_path)
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed_at = latest()
        saved = [int(path.name.removeprefix("update-")) for path in sorted((learner_dir / "checkpoints").glob("u*"))]

        with pytest.raises(InvalidSettings, match=f"begun before: latest published version {killed_at}"):
            run_learner(_config(tmp_path, url, model_dir), resume=False)

        end = saved[-1] + 3
        finished = stalewise(
            "learn", *_options(tmp_path, url, model_dir, f"learner.total_updates={end}"), "--resume", timeout_s=200
        )
        assert finished.returncode == 0, finished.stderr
        assert latest() == killed_at + 1 + 3
        stats = client.stats()["learner"]
        client.close()

    assert (stats["updates"], stats["total_updates"], stats["version"]) == (end, end, killed_at + 4)
    assert stats["metrics"]["age/updates_p50"] == killed_at + 3
    lines = [json.loads(line) for line in (learner_dir / "metrics.jsonl").read_text().splitlines()]
    assert undocumented(lines[-1].keys() - {"updates", "version"}) == []
    assert (learner_dir / "final").readlink() == Path(f"final-{killed_at + 4:08d}")
    assert [line["updates"] for line in lines[-3:]] == [end - 2, end - 1, end]
    assert [line["version"] for line in lines[-3:]] == [killed_at + 2, killed_at + 3, killed_at + 4]
    assert len(list((learner_dir / "tensorboard").glob("events.out.tfevents.*"))) == 2
    state = json.loads((learner_dir / "checkpoints" / f"update-{end:08d}" / "state.json").read_text())
    assert state["settings"]["learner"]["groups_per_update"] == 2


def test_the_best_evaluated_version_and_the_last_one_are_kept_beside_the_checkpoints(
    model_dir: Path, tmp_path: Path
) -> None:
    best = tmp_path / RUN_ID / "learner" / "best"
    with serving(make_context(tmp_path / "service", limiter=GENEROUS)) as url, ThreadPoolExecutor(1) as executor:

        def evaluate_and_feed() -> None:
            with closing(ServiceClient(url, settings=NO_RETRY)) as client:
                while client.run_info().latest_version != 0:
                    time.sleep(0.02)
                evaluations = HttpEvaluations(client)
                assert evaluations.claim(EvaluationClaim(actor_id="a", version=0, every_updates=5, lease_s=60)).granted
                evaluations.record(result(0))
                while not best.is_symlink():
                    time.sleep(0.02)
                _insert(client)

        fed = executor.submit(evaluate_and_feed)
        more = ("learner.keep_best=true", "actor.evaluation.every_updates=5", "learner.total_updates=1")
        run_learner(_config(tmp_path, url, model_dir, *more), resume=False)
        fed.result()

    final = best.with_name("final")
    assert (best.readlink(), final.readlink()) == (Path("best-00000000"), Path("final-00000001"))
    assert model_fingerprint(best) == model_fingerprint(final) == model_fingerprint(model_dir)
    assert not (final / "evaluation.json").exists()
    kept, last, first = (safetensors.torch.load_file(at / "model.safetensors") for at in (best, final, model_dir))
    assert kept.keys() == last.keys() == first.keys()
    assert all(tensor.equal(first[name]) for name, tensor in kept.items())
    assert not any(tensor.equal(first[name]) for name, tensor in last.items())


def test_every_tenth_update_logs_the_thresholds_to_choose_from(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = {**make_trainer(model_dir).update(collate(plain_samples(0), clock=1)), "time/sample_wait_s": 0.5}
    run_log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=0)
    client = ServiceClient("http://127.0.0.1:1", settings=NO_RETRY)
    with closing(run_log), closing(client), ThreadPoolExecutor(1) as executor:
        reporter = ServiceReporter(run_log, client, executor, total_updates=10, retries=lambda: 0)
        with caplog.at_level(logging.INFO):
            for updates in (9, 10):
                reporter.update(Progress(updates, updates), metrics, ())

    shown = [record.getMessage() for record in caplog.records if "thresholds" in record.getMessage()]
    p50, p70, p90 = (f"{metrics[f'trust_region/max_k2_nats_p{percent}_estimate']:.3g}" for percent in (50, 70, 90))
    assert len(shown) == 1
    assert f"keep 50 / 70 / 90 % of the sequences: max_k2_nats_estimate {p50} / {p70} / {p90}, mean_k3" in shown[0]


def test_what_is_counted_between_updates_is_on_the_dashboard_at_once(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=0)
    skipped = {"skipped/gradient_spike_updates_total": 2.0}
    stalled = {**skipped, "stall/warnings_total": 1.0}
    with serving(make_context(tmp_path / "service")) as url:
        client = ServiceClient(url, settings=NO_RETRY)
        with closing(run_log), closing(client):
            with ThreadPoolExecutor(1) as executor:
                reporter = ServiceReporter(run_log, client, executor, total_updates=10, retries=lambda: 0)
                reporter.skipped(Progress(3, 3), skipped)
            assert client.stats()["learner"]["metrics"] == skipped
            with ThreadPoolExecutor(1) as executor:
                reporter = ServiceReporter(run_log, client, executor, total_updates=10, retries=lambda: 0)
                reporter.waiting(Progress(3, 3), Wait(who="learner", since_s=9.0, reason="no data"), stalled)
            assert client.stats()["learner"]["metrics"] == stalled


def test_reports_that_a_service_does_not_answer_are_counted_and_never_pile_up(model_dir: Path, tmp_path: Path) -> None:
    metrics = {**make_trainer(model_dir).update(collate(plain_samples(0), clock=1)), "time/sample_wait_s": 0.5}
    run_log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = ServiceClient(url, settings=ClientSettings(read_timeout_s=0.2, retry_budget_s=0.0))
        with closing(run_log), closing(client), ThreadPoolExecutor(1) as executor:
            reporter = ServiceReporter(run_log, client, executor, total_updates=10, retries=lambda: 0)
            for updates in range(1, MAX_PENDING_REPORTS + 4):
                reporter.update(Progress(updates, updates), metrics, ())

    lost = [json.loads(line)["report/lost_total"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lost[0] == 0
    assert lost[-1] >= 2


def test_reports_that_fail_by_a_defect_are_logged_counted_and_keep_no_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ServiceClient):
        def post_learner_metrics(self, report: LearnerReport) -> None:
            raise RuntimeError(f"defect at {report.updates}")

    run_log = RunLog(tmp_path, run_name="run", wandb_project=None, updates_done=0)
    client = Broken("http://127.0.0.1:1", settings=NO_RETRY)
    with closing(run_log), closing(client), ThreadPoolExecutor(1) as executor:
        reporter = ServiceReporter(run_log, client, executor, total_updates=10, retries=lambda: 0)
        for updates in range(1, MAX_PENDING_REPORTS + 3):
            reporter.update(Progress(updates, updates), {}, ())
            executor.submit(lambda: None).result()  # the report has ended

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["report/lost_total"] for line in lines] == [*range(MAX_PENDING_REPORTS + 2)]
    assert f"defect at {MAX_PENDING_REPORTS + 2}" in caplog.text


@pytest.mark.timeout(240)
def test_a_learner_waits_while_its_service_is_away_and_ends_cleanly_on_sigterm(model_dir: Path, tmp_path: Path) -> None:
    log_path = tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limiter = [f"limiter.{name}={value}" for name, value in GENEROUS.model_dump().items()]
    service = ServeProcess(tmp_path, f"service.port={port}", "learner.groups_per_update=2", *limiter)
    try:
        url = service.wait_until_ready()
        client = ServiceClient(url)
        metrics = tmp_path / RUN_ID / "learner" / "metrics.jsonl"

        def num_updates() -> int:
            return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

        with _learning(log_path, _options(tmp_path, url, model_dir)) as process:
            _wait_for(lambda: client.run_info().latest_version == 0, process, log_path)
            _insert(client)
            _wait_for(lambda: num_updates() >= 2, process, log_path)
            service.process.kill()
            _wait_for(lambda: "retrying for up to" in log_path.read_text(), process, log_path)
            before = num_updates()
            service.restart()
            service.wait_until_ready()
            _wait_for(lambda: num_updates() >= before + 2, process, log_path)
            assert json.loads(metrics.read_text().splitlines()[-1])["request/retries_total"] >= 1

            process.terminate()
            assert process.wait(30) == 0, log_path.read_text()

        checkpoints = sorted((tmp_path / RUN_ID / "learner" / "checkpoints").glob("update-*"))
        assert int(checkpoints[-1].name.removeprefix("update-")) == num_updates()
        assert client.run_info().latest_version == num_updates()
        client.close()
    finally:
        service.stop()


@pytest.mark.timeout(240)
def test_service_and_learner_train_together_by_their_defaults(model_dir: Path, tmp_path: Path) -> None:
    log_path, service = tmp_path / "log", ServeProcess(tmp_path)
    try:
        url = service.wait_until_ready()
        client = ServiceClient(url)
        table = HttpTable(client)
        run = ("--set", f"run.name={RUN_ID}", "--set", f"run.runs_dir={tmp_path}", "--set", f"run.model={model_dir}")
        with _learning(log_path, [*run]) as process:
            _wait_for(lambda: client.run_info().latest_version == 0, process, log_path)
            table.insert([make_group(f"g{number}") for number in range(16)])
            _wait_for(lambda: client.run_info().latest_version == 1, process, log_path)
            process.terminate()
            assert process.wait(30) == 0, log_path.read_text()
        client.close()
        assert not (tmp_path / RUN_ID / "learner" / "final").exists()  # it was told to stop before its end
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("setting", "kind", "sentence"),
    [
        ("learner.objective.name=grpoo", InvalidSettings, "there is no objective 'grpoo'"),
        ("learner.device=abacus", InvalidSettings, "learner.device='abacus' cannot be used"),
        ("run.model=/nowhere", InvalidSettings, "/nowhere is neither a local model directory nor a model in the"),
        ("service.url=http://127.0.0.1:9", ServiceUnreachable, "no answer from http://127.0.0.1:9"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    model_dir: Path, tmp_path: Path, setting: str, kind: type[StalewiseError], sentence: str
) -> None:
    with serving(make_context(tmp_path / "service")) as url, pytest.raises(kind, match=f"^{sentence}"):
        run_learner(_config(tmp_path, url, model_dir, "client.retry_budget_s=0", setting), resume=False)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("learner.lora.rank=4", "learner.lora is set and torchrun has started 2 ranks, but adapters are not split"),
        ("learner.device=cuda:1", "learner.device='cuda:1' is one GPU for all 2 ranks"),
    ],
)
def test_what_one_process_alone_can_do_is_refused_on_several_ranks(setting: str, sentence: str) -> None:
    config = load_config(None, overrides=[setting])

    check_ranks(config, ALONE)
    with pytest.raises(InvalidSettings, match=f"^{sentence}"):
        check_ranks(config, Ranks(rank=1, size=2))


def test_a_directory_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    config, model = _config(tmp_path, "http://127.0.0.1:9", tmp_path / "model"), tmp_path / "model"
    model.mkdir()

    with pytest.raises(InvalidSettings, match=r"is not a model directory: it has no config\.json"):
        run_learner(config, resume=False)
    (model / "config.json").write_text("{}")
    with (
        serving(make_context(tmp_path / "service")) as url,
        pytest.raises(InvalidSettings, match="does not hold a causal language model: Unrecognized model") as caught,
    ):
        run_learner(_config(tmp_path, url, model), resume=False)
    assert "\n" not in str(caught.value)


def test_another_run_and_another_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with serving(make_context(tmp_path / "service")) as url:
        with pytest.raises(RunMismatch, match=f"serves run {RUN_ID}, but run.name is other"):
            run_learner(_config(tmp_path, url, model_dir, "run.name=other"), resume=False)

        client = ServiceClient(url, settings=NO_RETRY)
        PublishingTable(client).advance_version(0)  # by a model of its own
        client.close()
        with pytest.raises(RunMismatch, match="was begun with another model or tokenizer"):
            run_learner(_config(tmp_path, url, model_dir), resume=True)
