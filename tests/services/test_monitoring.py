"""The Prometheus and Grafana files of docker/monitoring use metrics that exist, and alerts ring when they should."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
MANUAL = Path(__file__).parents[2] / "docs" / "metrics.md"
_NAME = r"\bstalewise_\w+"


def documented() -> set[str]:
    """The names that tests/services/test_prometheus.py holds against the service."""
    return set(re.findall(rf"^\| `({_NAME})", MANUAL.read_text(), re.MULTILINE))


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_and_panels_ask_for_metrics_that_exist() -> None:
    board = json.loads((MONITORING / "grafana" / "dashboards" / "stalewise.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {
        name for expression in (*panels, *(rule["expr"] for rule in rules())) for name in re.findall(_NAME, expression)
    }

    assert len(panels) > 20
    assert asked - documented() == set()


def test_learner_metrics_asked_for_by_name_are_documented() -> None:
    text = (MONITORING / "grafana" / "dashboards" / "stalewise.json").read_text()
    names = re.findall(r'stalewise_learner_metric\{name=\\"([a-z_]+/\w+)\\"', text)

    assert {"reward/mean", "age/updates_p50"} <= set(names)
    assert [name for name in names if f"| `{name}` |" not in MANUAL.read_text()] == []


def test_every_alert_says_what_to_do_and_is_made_to_ring() -> None:
    tested = (MONITORING / "alerts_test.yml").read_text()

    for rule in rules():
        assert {"summary", "do"} <= set(rule["annotations"]), rule["alert"]
        assert rule["alert"] in tested


def test_provisioned_files_name_each_other() -> None:
    source = yaml.safe_load((MONITORING / "grafana/datasources/prometheus.yml").read_text())
    board = json.loads((MONITORING / "grafana/dashboards/stalewise.json").read_text())

    compose = yaml.safe_load((MONITORING.parents[1] / "docker-compose.yml").read_text())["services"]
    (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards/stalewise.yml").read_text())["providers"]
    mounts = [volume.split(":")[:2] for role in ("prometheus", "grafana") for volume in compose[role]["volumes"]]
    mounted = {Path(there): MONITORING.parents[1] / here for here, there in mounts if here.startswith("./")}

    assert all(here.exists() for here in mounted.values())
    assert any((here / "dashboards") == MONITORING / "grafana" / "dashboards" for here in mounted.values())
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    assert Path("/etc/grafana/provisioning") in mounted
    (uid,) = (entry["uid"] for entry in source["datasources"])
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {uid}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_promtool_finds_rules_and_configuration_right_and_rings_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH (apt-get install prometheus): the alerts were not rung")
    for arguments in (
        ("check", "rules", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        ended = subprocess.run([promtool, *arguments], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
