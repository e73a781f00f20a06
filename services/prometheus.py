"""`/metrics` for Prometheus: the statistics of the service read anew at each scrape; nothing is counted twice.

Each metric is described in docs/metrics.md; a test holds the two against each other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from fastapi import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

from buffer.evaluations import EvaluationBoard
from buffer.staleness import AGE_BUCKETS, age_bucket
from buffer.table import TableStats
from buffer.wire import ActorStatus, LearnerStatus, ServiceStats
from services.context import ServiceContext
from services.operations import Operation
from services.stats import service_stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_USES = (0, 1, 2, 3, 7)


def metrics_operation(context: ServiceContext) -> Operation:
    """Return the operation that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatsCollector(lambda: service_stats(context)))

    async def metrics() -> Response:
        """Return the statistics in the text format of Prometheus."""
        return Response(await run_in_threadpool(generate_latest, registry), media_type=CONTENT_TYPE)

    return Operation(route="GET /metrics", endpoint=metrics, answers={200: ("text/plain",)}, problems=(503,))


class StatsCollector(Collector):
    """Reads the statistics when it is asked to collect."""

    def __init__(self, read: Callable[[], ServiceStats]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield every metric. Raises StoreUnavailable."""
        stats = self._read()
        yield InfoMetricFamily(
            "stalewise_run",
            "The run that is served",
            value={"run_id": stats.run.run_id, "model_fingerprint": stats.run.model_fingerprint or ""},
        )
        yield _gauge("uptime_seconds", "Since this service process started", stats.uptime_s)
        yield from _table(stats.table)
        yield from _limits(stats)
        yield from _pacing(stats)
        yield from _weights(stats)
        yield from _evaluations(stats.evaluations)
        if stats.learner is not None:
            yield from _learner(stats.learner)
        yield from _actors(stats.actors, clock=stats.run.latest_version)


def _table(table: TableStats) -> Iterator[Metric]:
    yield _gauge("table_groups", "Stored train groups", table.num_groups)
    yield _gauge("table_fresh_groups", "Of these, never handed out", table.num_fresh)
    yield _gauge("table_foreign_groups", "Of these, with tokens that other weights drew", table.num_foreign)
    yield _gauge("table_eval_groups", "Stored eval groups", table.num_eval)
    yield _gauge("table_partial_groups", "Groups submitted in parts that are not stored yet", table.num_partial_groups)
    yield _gauge("table_bytes", "Encoded bytes of stored groups", table.bytes)
    yield _gauge("table_partial_bytes", "Encoded bytes of partial groups", table.partial_bytes)
    yield _gauge("table_repeat_bytes", "Encoded bytes of removed groups kept for repeats", table.repeat_bytes)
    yield _gauge("table_response_tokens", "Response tokens of stored train groups", table.num_response_tokens)
    yield _gauge("table_prompts", "Prompts with statistics", table.num_prompts)
    yield _gauge("table_reuse_mean", "Times a group was handed out, mean over those handed out", table.reuse_mean)
    yield _gauge("table_reward_sum", "Rewards of all accepted train trajectories, added up", table.reward_sum)
    yield _counter("table_inserted_groups", "Train groups accepted", table.inserted_total)
    yield _counter("table_sampled_groups", "Train groups handed out", table.sampled_total)
    yield _counter("table_trajectories", "Train trajectories accepted", table.num_trajectories_total)
    yield _counters("table_outcomes", "Submitted groups by outcome", "outcome", table.outcomes)
    yield _counters("table_part_outcomes", "Submitted parts by outcome", "outcome", table.part_outcomes)
    yield _counters("table_removed_groups", "Removed groups by reason", "reason", table.removed)
    yield _counter("table_forgotten_ids", "Ids forgotten too early", table.forgotten_ids_total)
    yield _counter("table_dropped_repeats", "Removed groups dropped before their time", table.dropped_repeats_total)
    yield _counter("table_forgotten_prompts", "Prompts whose statistics were dropped", table.forgotten_prompts_total)
    yield _counter("table_weights_left_behind", "Groups that kept an old weight", table.weights_left_behind_total)
    by_age = dict.fromkeys(AGE_BUCKETS, 0) | {"foreign": table.num_foreign}
    for version, count in table.stored_versions.items():
        by_age[age_bucket(max(0, table.latest_version - version))] += count
    yield _gauges("table_groups_by_age", "Stored groups by age in updates", "age", by_age)
    by_uses = {str(most): 0 for most in _USES} | {"more": 0}
    for uses, count in table.stored_uses.items():
        by_uses[next((str(most) for most in _USES if uses <= most), "more")] += count
    yield _gauges("table_groups_by_uses", "Stored groups by times handed out, at most so many", "uses", by_uses)


def _limits(stats: ServiceStats) -> Iterator[Metric]:
    limits, store = stats.run.limits, stats.store
    yield _gauge("table_capacity_groups", "Groups kept at most", limits.capacity_groups)
    yield _gauge("table_capacity_bytes", "Bytes kept at most", limits.capacity_bytes)
    yield _gauge("store_memory_bytes", "Memory of Redis", store.memory_bytes)
    yield _gauge("store_memory_limit_bytes", "Redis' maxmemory; 0 = none", store.memory_limit_bytes)
    yield _gauge("store_disk_free_bytes", "Free where the run's directory is", store.disk_free_bytes)
    yield _gauge("store_disk_total_bytes", "All of that disk", store.disk_total_bytes)


def _pacing(stats: ServiceStats) -> Iterator[Metric]:
    yield _gauge("limiter_error", "How far inserts are ahead, in draws of one group", stats.table.limiter_error)
    waits = dict.fromkeys(("learner", "actors"), 0.0) | {wait.who: wait.since_s for wait in stats.table.waits}
    yield _gauges("limiter_waiting_seconds", "For how long the limiter has held them; 0 = it does not", "who", waits)


def _weights(stats: ServiceStats) -> Iterator[Metric]:
    weights = stats.weights
    yield _gauge("weights_latest_version", "Latest published version; -1 before the first", weights.latest_version)
    yield _gauge("weights_bytes", "Stored payloads", weights.bytes)
    yield _gauge("weights_versions", "Versions still served", len(weights.versions))
    yield _counter("weights_deleted_versions", "Versions that retention has removed", weights.deleted_total)
    if weights.published:
        newest = weights.published[-1]
        yield _gauge("weights_published_timestamp_seconds", "When the latest version was published", newest.created_s)
        yield _gauge("weights_latest_bytes", "Payloads of the latest version", newest.bytes)


def _evaluations(board: EvaluationBoard) -> Iterator[Metric]:
    if board.results:
        newest = board.results[-1]
        yield _gauges("evaluation_pass_at", "Of the newest evaluation, by k", "k", newest.pass_at)
        yield _gauge("evaluation_version", "The version that it evaluated", newest.version)
    if board.best_version is not None:
        yield _gauge("evaluation_best_version", "The version with the highest pass@1", board.best_version)


def _learner(learner: LearnerStatus) -> Iterator[Metric]:
    yield _counter("learner_updates", "Updates of the weights", learner.updates)
    if learner.total_updates is not None:
        yield _gauge("learner_planned_updates", "Updates after which it is done", learner.total_updates)
    yield _gauge("learner_version", "The learner's clock", learner.version)
    yield _gauge("learner_silent_seconds", "Since its last report", learner.age_s)
    waited_s = learner.waiting.since_s if learner.waiting else 0.0
    yield _gauge("learner_waiting_seconds", "For how long it has waited for a batch; 0 = it does not", waited_s)
    yield _gauges("learner_metric", "A metric of the last update, by its name", "name", learner.metrics)


def _actors(actors: list[ActorStatus], *, clock: int) -> Iterator[Metric]:
    def by_actor(read: Callable[[ActorStatus], float]) -> dict[str, float]:
        return {actor.actor_id: read(actor) for actor in actors}

    yield _gauge("actors", "Actors heard of lately", len(actors))
    yield _gauges("actor_version", "Weights in use", "actor", by_actor(lambda actor: actor.version))
    lag = by_actor(lambda actor: max(0, clock - actor.version))
    yield _gauges("actor_lag_updates", "Latest version - version in use", "actor", lag)
    yield _gauges("actor_tokens_per_second", "Drawn of late", "actor", by_actor(lambda actor: actor.tokens_per_s))
    yield _counters("actor_groups", "Groups answered", "actor", by_actor(lambda actor: actor.groups_total))
    unscored = by_actor(lambda actor: actor.unscored_groups_total)
    yield _counters("actor_unscored_groups", "Groups dropped without a reward", "actor", unscored)
    yield _gauges("actor_silent_seconds", "Since its heartbeat", "actor", by_actor(lambda actor: actor.age_s))
    states = GaugeMetricFamily("stalewise_actor_state", "1 for what it is doing", labels=("actor", "state"))
    for actor in actors:
        states.add_metric((actor.actor_id, actor.state), 1)
    yield states
    loads = {actor.actor_id: actor.loads[-1].publish_to_loaded_s for actor in actors if actor.loads}
    yield _gauges("actor_publish_to_loaded_seconds", "Of the version loaded last", "actor", loads)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"stalewise_{name}", help_text, value=value)


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"stalewise_{name}", help_text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"stalewise_{name}", help_text, value=value)


def _counters(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"stalewise_{name}", help_text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
