"""`stalewise demo`: one command runs the whole loop as separate processes and reports what it learned.

Redis (a child of the service), the service, one learner and the actors each run in their own process, with their own
log in runs/<name>/logs. A process that dies is started again, a few times, and the screen says so.
"""

import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import median

from rich.console import Console
from rich.live import Live

from actor.evaluate import held_out_accuracy
from actor.tasks import HELD_OUT_PROMPTS, Task, make_task
from actor.tokenizer import load_tokenizer
from actor.torch_engine import TorchEngine
from actor.weight_sync import check_canary
from buffer.client import ClientSettings, HttpWeightStore, ServiceClient
from buffer.errors import StalewiseError
from buffer.weights.follower import Follower
from services.address import read_address
from services.model_dir import local_model_dir
from services.processes import Child, ChildFailed, Supervisor
from services.progress import Snapshot, screen
from services.report import Summary, plot, read_metrics, result_table
from services.settings import RunConfig, RunSettings, connect

POLL_S = 1.0
"""Between two looks at /v1/stats."""

_IMPATIENT = ClientSettings(retry_budget_s=0.0, connect_timeout_s=2.0, read_timeout_s=5.0)
"""For the watch: while the service is away the screen goes on, and the others are looked after."""


def run_demo(config: RunConfig, *, arguments: Sequence[str]) -> Summary:
    """Run the demo in a new directory below run.runs_dir, named after run.name and the time.

    `arguments` are the --config and --set options that made `config`: the processes are started with the same.
    Raises InvalidSettings for a bad model, ChildFailed when a process dies too often, and what evaluation and report
    raise.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leave through the clean-up, as at Ctrl-C
    model_dir = local_model_dir(config.run.model)
    task = make_task(config.actor.task, load_tokenizer(model_dir))  # a bad model is refused before anything is started
    name = _new_run(config.run)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name, "model": model_dir})})
    arguments = [*arguments, "--set", f"run.name={json.dumps(name)}"]
    return Demo(config, task=task, arguments=arguments, console=Console()).run()


def _new_run(run: RunSettings) -> str:
    """Make the directory of a run that nobody else has, and return its name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in itertools.count():
        name = f"{run.name}-{stamp}" + (f"-{attempt}" if attempt else "")
        try:
            (run.runs_dir / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError("itertools.count ended")


class Demo:
    """One run of the demo, in the order of its methods."""

    def __init__(self, config: RunConfig, *, task: Task, arguments: Sequence[str], console: Console) -> None:
        self._config = config
        self._arguments = list(arguments)
        self._console = console
        self._directory = config.run.directory
        self._supervisor = Supervisor(max_restarts=config.demo.max_restarts)
        self._history: list[Snapshot] = []
        self._task = task

    def run(self) -> Summary:
        """Start, watch, stop, evaluate, report."""
        logging.getLogger("actor").setLevel(logging.WARNING)  # of the engine here: the actors' own logs are files
        engine = TorchEngine(self._config.run.model, seed=self._config.run.seed)
        engine.load(self._config.run.model / "model.safetensors", version=0)
        before = self._accuracy(engine)
        started_s = time.monotonic()
        try:
            url = self._start()
            self._watch(self._client(url, _IMPATIENT), lambda: time.monotonic() - started_s)
            self._load_final_weights(self._client(url, self._config.client), engine)
        finally:
            self._supervisor.stop()
        return self._report(before, self._accuracy(engine))

    def _start(self) -> str:
        service = self._supervisor.start(self._child("service", ["serve"], {"service.port": "0"}))
        url = self._wait_for_address(service)
        service.arguments = [*service.arguments, "--set", f"service.port={url.rsplit(':', 1)[1]}"]  # for a restart
        learner = self._child("learner", ["learn", "--resume"], {"service.url": url})
        learner.may_finish = True
        self._supervisor.start(learner)
        for number in range(self._config.demo.num_actors):
            name = f"actor-{number}"
            self._supervisor.start(self._child(name, ["act", "--actor-id", name], {"service.url": url}))
        self._console.print(f"live numbers: {url} (or: stalewise stats --set service.url={url})", soft_wrap=True)
        self._console.print(f"logs: {self._directory / 'logs'}", soft_wrap=True)
        return url

    def _client(self, url: str, patience: ClientSettings) -> ServiceClient:
        service = self._config.service.model_copy(update={"url": url})
        return connect(self._config.model_copy(update={"service": service, "client": patience}))

    def _child(self, name: str, command: Sequence[str], settings: dict[str, str]) -> Child:
        overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return Child(
            name=name,
            arguments=[*command, *self._arguments, *overrides],
            log_path=self._directory / "logs" / f"{name}.log",
            environment={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def _wait_for_address(self, service: Child) -> str:
        deadline_s = time.monotonic() + self._config.demo.start_timeout_s
        while (address := read_address(self._directory)) is None:
            if service.exit_code is not None:
                raise ChildFailed(service.last_words(1), hint=f"see {service.log_path}")
            if time.monotonic() > deadline_s:
                raise ChildFailed(
                    f"the service did not come up within {self._config.demo.start_timeout_s:g} s",
                    hint=f"see {service.log_path}",
                )
            time.sleep(0.05)
        return address

    def _watch(self, client: ServiceClient, elapsed_s: Callable[[], float]) -> None:
        """Show progress until the learner has done its updates; restart what dies meanwhile."""
        learner = next(child for child in self._supervisor.children if child.name == "learner")
        total_updates = self._config.learner.total_updates
        with Live(console=self._console, auto_refresh=False) as live:
            while True:
                finished = learner.exit_code == 0
                self._supervisor.check()
                try:
                    self._history.append(Snapshot.from_stats(client.stats(), seconds=elapsed_s()))
                except StalewiseError as error:  # the service is being restarted
                    self._supervisor.note(str(error))
                if self._history:
                    live.update(
                        screen(
                            self._history,
                            title=self._config.run.name,
                            total_updates=total_updates,
                            events=self._supervisor.events,
                        ),
                        refresh=True,
                    )
                if finished:
                    return
                time.sleep(POLL_S)

    def _load_final_weights(self, client: ServiceClient, engine: TorchEngine) -> None:
        """Load the last published version, proven by its canary as any actor's would be."""
        store = HttpWeightStore(client)
        manifest = store.latest()
        assert manifest is not None, "a learner that finished has published"
        mirror, _ = Follower(store, self._directory).follow(manifest)
        assert mirror.path is not None
        engine.load(mirror.path, manifest.version, adapter=manifest.adapter)
        check_canary(engine, manifest.probe, version=manifest.version)

    def _accuracy(self, engine: TorchEngine) -> float:
        return held_out_accuracy(engine, self._task, self._config.actor)

    def _report(self, before: float, after: float) -> Summary:
        """Write summary.json, table.txt and plot.png into the run's directory, and show the table."""
        metrics = read_metrics(self._directory / "learner" / "metrics.jsonl")
        last = self._history[-1]
        summary = Summary(
            run_id=self._config.run.name,
            accuracy_before=before,
            accuracy_after=after,
            held_out_prompts=HELD_OUT_PROMPTS,
            seconds=last.seconds,
            rollouts=last.rollouts,
            updates=round(metrics[-1]["updates"]),
            age_updates_p50=median(record["age/updates_p50"] for record in metrics),
            age_updates_p90=median(record["age/updates_p90"] for record in metrics),
            reuse_mean=last.reuse_mean,
            rollouts_per_s=last.rollouts / last.seconds,
            updates_per_s=metrics[-1]["updates"] / last.seconds,
            restarts=sum(child.restarts for child in self._supervisor.children),
            groups_by_outcome=dict(last.outcomes),
            settings=self._config.model_dump(mode="json"),
        )
        (self._directory / "summary.json").write_text(summary.model_dump_json(indent=2) + "\n")
        plot(self._directory / "plot.png", metrics, self._history, summary)
        table = result_table(summary)
        with (self._directory / "table.txt").open("w") as file:
            Console(file=file, width=100).print(table)
        self._console.print(table)
        self._console.print(f"written: {self._directory}/summary.json, table.txt, plot.png", soft_wrap=True)
        return summary
