"""`stalewise learn`: one learner, from its settings to a clean end; under torchrun, one rank of it."""

import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from buffer.client import HttpTable, HttpWeightStore, ServiceClient
from buffer.errors import InvalidSettings, StalewiseError
from buffer.evaluations_client import HttpEvaluations
from buffer.fingerprint import model_fingerprint
from buffer.heap import keep_freed_memory
from buffer.redis_client import connect as connect_to_redis
from buffer.redis_shards import open_table
from buffer.table import SampleRequest, TableStats, Wait
from buffer.trained import TrainedGroup
from buffer.types import Sample
from buffer.wire import LearnerReport
from learner.admission import Admission
from learner.checkpoint import Checkpoints
from learner.distributed import Ranks, joined
from learner.evaluation import EvaluationWatch
from learner.following import follow
from learner.kept import KeptVersion
from learner.loop import LearnerLoop, take_up
from learner.lora import AdapterPolicy
from learner.objectives.acceptance import acceptance_sentence
from learner.objectives.diagnostics import diagnose
from learner.objectives.objective import Objective
from learner.objectives.recipes import build_objective
from learner.policy import Policy
from learner.publisher import Publisher
from learner.run_log import RunLog
from learner.sampling import Prefetcher, selector_schedule
from learner.sharding import ShardedPolicy
from learner.step import Progress, Trainer
from services.model_dir import local_model_dir
from services.run_check import check_run
from services.settings import RunConfig, connect, log_settings

log = logging.getLogger(__name__)

REPORT_CLIENT = {"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "retry_budget_s": 0.0}
"""A report that is lost is followed by another one: it must not hold up a step."""
MAX_PENDING_REPORTS = 4
"""Reports on their way; while there are so many, further ones are lost."""
LOG_EVERY_UPDATES = 10


class ServiceReporter:
    """Writes metrics to the run's log and posts them to the service, beside the next step; a lost post is counted."""

    def __init__(
        self,
        run_log: RunLog,
        client: ServiceClient,
        executor: Executor,
        *,
        total_updates: int,
        retries: Callable[[], int],
    ) -> None:
        self._run_log = run_log
        self._client = client
        self._executor = executor
        self._total_updates = total_updates
        self._retries = retries
        self._last: Mapping[str, float] = {}
        self._pending = 0
        self._lost = 0
        self._counts = threading.Lock()  # of the two numbers above: this thread's and the executor's
        self._is_away = False  # the last report was not taken: the executor's

    def update(self, progress: Progress, metrics: Mapping[str, float], trained: Sequence[TrainedGroup]) -> None:
        """See learner.loop.Reporter."""
        counts = {"report/lost_total": float(self._lost), "request/retries_total": float(self._retries())}
        self._last = {**metrics, **counts}
        self._run_log.write(progress, self._last)
        if progress.updates % LOG_EVERY_UPDATES == 0:
            log.info(
                "update %d: reward %.3f, age %.0f updates, waited %.2f s",
                progress.updates,
                metrics["reward/mean"],
                metrics.get("age/updates_p50", math.nan),
                metrics["time/sample_wait_s"],
                extra={"version": progress.clock},
            )
            log.info("%s", acceptance_sentence(metrics))
        self._post(progress, None, trained)

    def waiting(self, progress: Progress, wait: Wait, counts: Mapping[str, float]) -> None:
        """See learner.loop.Reporter."""
        self._last = {**self._last, **counts}
        self._post(progress, wait, ())

    def skipped(self, progress: Progress, counts: Mapping[str, float]) -> None:
        """See learner.loop.Reporter."""
        self._last = {**self._last, **counts}
        self._post(progress, None, ())

    def _post(self, progress: Progress, wait: Wait | None, trained: Sequence[TrainedGroup]) -> None:
        finite = {name: value for name, value in self._last.items() if math.isfinite(value)}  # JSON has no others
        report = LearnerReport(
            updates=progress.updates,
            total_updates=self._total_updates,
            version=progress.clock,
            metrics=finite,
            waiting=wait,
            trained=tuple(trained),
        )
        with self._counts:
            is_sent = self._pending < MAX_PENDING_REPORTS
            self._pending += is_sent
            self._lost += not is_sent
        if is_sent:
            self._executor.submit(self._send, report)

    def _send(self, report: LearnerReport) -> None:
        is_taken = False
        try:
            self._client.post_learner_metrics(report)
            is_taken = True
        except StalewiseError as error:
            if not self._is_away:
                log.warning("the service does not take reports of the learner: %s", error)
        except Exception:  # a defect of ours: it would stay in a future that nobody asks
            log.exception("a report of the learner could not be sent")
        finally:
            self._is_away = not is_taken
            with self._counts:
                self._pending -= 1
                self._lost += self._is_away


def run_learner(config: RunConfig, *, resume: bool) -> None:
    """Train until `learner.total_updates`, or until SIGTERM or SIGINT, which finish the step, publish and save.

    Under torchrun all ranks make this call; the first one talks to the service for all, the others send their weights.
    Raises InvalidSettings, RunMismatch, CorruptCheckpoint, ServiceUnreachable, RankLost, and what ends the loop.
    """
    keep_freed_memory()
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    transformers_logging.disable_progress_bar()
    with joined(config.learner.device) as ranks:
        check_ranks(config, ranks)
        if ranks.is_first:
            log_settings(config)
        objective = build_objective(config.learner.objective.name, config.learner.objective.options)
        model_dir = local_model_dir(config.run.model)
        with ExitStack() as stack:
            _learn(config, model_dir, objective, ranks=ranks, resume=resume, stack=stack)


def _learn(
    config: RunConfig, model_dir: Path, objective: Objective, *, ranks: Ranks, resume: bool, stack: ExitStack
) -> None:
    stop = stack.enter_context(_stop_on_signals())  # the first rank stops; the others go on with it to its end
    client = stack.enter_context(closing(connect(config, stopping=stop)))
    fingerprint = model_fingerprint(model_dir)
    check_run(client, config, fingerprint)
    trainer = _make_trainer(config, model_dir, objective, ranks)
    checkpoints = Checkpoints(
        config.run.directory / "learner" / "checkpoints",
        keep=config.learner.keep_checkpoints,
        model_fingerprint=fingerprint,
        resolved_settings=config.model_dump(mode="json"),
        ranks=ranks,
    )
    publisher = Publisher(
        HttpWeightStore(client),
        run_id=config.run.name,
        model_fingerprint=fingerprint,
        keyframe_every=config.learner.keyframe_every,
        executor=stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="publisher")),
        unix_time=time.time,
        ranks=ranks.beside(),
    )
    take_up(trainer, checkpoints, publisher, resume=resume, ranks=ranks)
    if not ranks.is_first:
        follow(trainer, publisher, checkpoints, config.learner, ranks=ranks)
        return
    _watch_evaluations(config, model_dir, stop, stack)
    LearnerLoop(
        trainer=trainer,
        prefetcher=_make_prefetcher(config, trainer, sample_source(config, client, stack)),
        admission=Admission(
            max_age_updates=config.table.max_age_updates,
            vocab_size=trainer.policy.vocab_size,
            max_positions=trainer.policy.max_positions,
            columns=objective.columns,
        ),
        publisher=publisher,
        checkpoints=checkpoints,
        reporter=_open_reporter(config, trainer, client, stack),
        settings=config.learner,
        stop=stop,
        now=time.monotonic,
        ranks=ranks,
    ).run()
    latest = publisher.latest_version()
    if config.learner.keep_final and latest is not None and trainer.progress.updates >= config.learner.total_updates:
        directory = config.run.directory / "learner"
        KeptVersion(HttpWeightStore(client), directory, "final", model_dir=model_dir).keep(latest)


def check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raise InvalidSettings for what one process can do and several cannot."""
    if ranks.size == 1:
        return
    if config.learner.lora is not None:
        raise InvalidSettings(
            f"learner.lora is set and torchrun has started {ranks.size} ranks, but adapters are not split over ranks",
            hint="train the adapter in one process, without torchrun, or all weights on several ranks",
        )
    if ":" in config.learner.device:
        raise InvalidSettings(
            f"learner.device={config.learner.device!r} is one GPU for all {ranks.size} ranks",
            hint="set learner.device to 'cuda': each rank of a machine takes the GPU of its number",
        )


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_trainer(config: RunConfig, model_dir: Path, objective: Objective, ranks: Ranks) -> Trainer:
    settings = config.learner
    load = partial(
        Policy.load,
        model_dir,
        device=settings.device,
        micro_batch_tokens=settings.micro_batch_tokens,
        compute=settings.compute,
    )
    policy = load() if ranks.size == 1 else ShardedPolicy(load, ranks=ranks)
    return Trainer(
        policy=policy if settings.lora is None else AdapterPolicy.on(policy, settings.lora),
        objective=objective,
        settings=settings,
        diagnose=diagnose,
        now=time.monotonic,
    )


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Where batches come from."""

    draw: Callable[[SampleRequest], list[Sample]]
    stats: Callable[[], TableStats]


def sample_source(config: RunConfig, client: ServiceClient, stack: ExitStack) -> SampleSource:
    """Return the service as a source of batches, or its Redis, with the same retries. Raises InvalidSettings."""
    if not config.service.samples_from_redis:
        http = HttpTable(client)
        return SampleSource(partial(http.sample, timeout_s=config.learner.sample_timeout_s), http.stats)
    if config.service.redis_url is None:
        raise InvalidSettings(
            "service.samples_from_redis is set, but service.redis_url is not: a service's own Redis cannot be reached",
            hint="give service.redis_url to service and learner",
        )
    connection = stack.enter_context(closing(connect_to_redis(config.service.redis_url)))
    table = open_table(connection, config.table, config.limiter, config.run.name)
    return SampleSource(
        lambda request: client.retry(partial(table.sample, request), what="draw from Redis"),
        lambda: client.retry(table.stats, what="statistics from Redis"),
    )


def _make_prefetcher(config: RunConfig, trainer: Trainer, source: SampleSource) -> Prefetcher:
    return Prefetcher(
        source.draw,
        source.stats,
        config.learner,
        clock=lambda: trainer.progress.clock,
        schedule=selector_schedule(config.learner, updates_done=trainer.progress.updates),
        request_prefix=f"learner-{uuid.uuid4().hex}",
        now=time.monotonic,
    )


def _open_reporter(config: RunConfig, trainer: Trainer, client: ServiceClient, stack: ExitStack) -> ServiceReporter:
    """Return the reporter of a run whose draws and publications go over `client`."""
    run_log = RunLog(
        config.run.directory / "learner",
        run_name=config.run.name,
        wandb_project=config.learner.wandb_project,
        updates_done=trainer.progress.updates,
    )
    return ServiceReporter(
        stack.enter_context(closing(run_log)),
        stack.enter_context(closing(_report_client(config))),
        stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="reporter")),
        total_updates=config.learner.total_updates,
        retries=lambda: client.retries_total,
    )


def _watch_evaluations(config: RunConfig, model_dir: Path, stop: threading.Event, stack: ExitStack) -> None:
    if config.actor.evaluation.every_updates is None:
        return
    directory = config.run.directory / "learner"
    best = None
    if config.learner.keep_best:
        client = stack.enter_context(closing(connect(config, stopping=stop)))
        best = KeptVersion(HttpWeightStore(client), directory, "best", model_dir=model_dir)
    watch = EvaluationWatch(
        HttpEvaluations(stack.enter_context(closing(_report_client(config)))),
        directory / "evaluations.jsonl",
        patience_evaluations=config.learner.early_stop_evaluations,
        best_weights=best,
        stop=stop,
    )
    stack.enter_context(watch)


def _report_client(config: RunConfig) -> ServiceClient:
    return connect(config.model_copy(update={"client": config.client.model_copy(update=REPORT_CLIENT)}))
