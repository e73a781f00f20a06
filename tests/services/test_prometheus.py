"""What Prometheus scrapes is what the statistics say, and the manual names each metric."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from buffer.evaluations import EvaluationClaim
from buffer.table import SampleRequest
from buffer.wire import Heartbeat, LearnerReport, Load
from services.context import ServiceContext
from tests.factories import PAYLOAD, make_group, make_manifest
from tests.services.live import make_context, serving
from tests.services.test_evaluations import result

MANUAL = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServiceContext, str]]:
    """A service with something to say about everything, and what it says."""
    context = make_context(tmp_path_factory.mktemp("scraped"))
    manifest = make_manifest(3)
    context.weights.put_blob(manifest.payloads[0].sha256, [PAYLOAD])
    context.weights.publish(manifest)
    context.table.advance_version(3)
    context.table.insert([make_group(name, version=version) for name, version in (("a", 0), ("b", 2), ("c", 3))])
    assert context.table.sample(SampleRequest(num_groups=1, learner_version=3, request_id="r"))
    lease = EvaluationClaim(actor_id="a", version=3, every_updates=10, lease_s=60.0)
    assert context.evaluations.claim(lease).granted
    context.evaluations.record(result(3, pass_1=0.75))
    report = LearnerReport(updates=4, total_updates=8, version=4, metrics={"reward/mean": 0.5, "k3/nats_mean": 0.25})
    context.presence.report(report)
    loads = (Load(version=2, publish_to_loaded_s=0.75),)
    context.presence.heartbeat(
        "a",
        Heartbeat(
            version=2, tokens_per_s=10.0, groups_total=5, unscored_groups_total=1, state="generating", loads=loads
        ),
    )
    with serving(context) as url:
        answered = httpx.get(f"{url}/metrics", trust_env=False)
        assert answered.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        yield context, answered.text


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and the values of their labels."""
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_values_are_those_of_the_statistics(scraped: tuple[ServiceContext, str]) -> None:
    found = samples(scraped[1])

    expected = {
        ("stalewise_table_groups", ""): 3,
        ("stalewise_table_fresh_groups", ""): 2,
        ("stalewise_table_inserted_groups_total", ""): 3,
        ("stalewise_table_outcomes_total", "accepted"): 3,
        ("stalewise_table_groups_by_age", "0"): 1,
        ("stalewise_table_groups_by_age", "1_3"): 2,
        ("stalewise_table_groups_by_age", "4_15"): 0,
        ("stalewise_table_groups_by_uses", "0"): 2,
        ("stalewise_table_groups_by_uses", "1"): 1,
        ("stalewise_weights_latest_version", ""): 3,
        ("stalewise_learner_updates_total", ""): 4,
        ("stalewise_learner_planned_updates", ""): 8,
        ("stalewise_learner_metric", "reward/mean"): 0.5,
        ("stalewise_actor_lag_updates", "a"): 1,
        ("stalewise_actor_unscored_groups_total", "a"): 1,
        ("stalewise_actor_state", "a,generating"): 1,
        ("stalewise_actor_publish_to_loaded_seconds", "a"): 0.75,
        ("stalewise_evaluation_pass_at", "1"): 0.75,
        ("stalewise_evaluation_best_version", ""): 3,
        ("stalewise_limiter_waiting_seconds", "learner"): 0,
        ("stalewise_store_disk_total_bytes", ""): 3,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_manual_names_every_metric_and_no_other(scraped: tuple[ServiceContext, str]) -> None:
    documented = set(re.findall(r"^\| `(stalewise_\w+)(?:\{\w+(?:, \w+)*\})?` \|", MANUAL.read_text(), re.MULTILINE))

    assert set(re.findall(r"^# TYPE (\w+) ", scraped[1], re.MULTILINE)) == documented
