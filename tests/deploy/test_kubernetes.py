"""The Kubernetes example is valid by the API's own schemas, and starts what docker-compose.yml starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.settings import load_config
from tests.deploy.compose import COMPOSE, REPOSITORY, resolved, variables

KUBERNETES = REPOSITORY / "deploy/kubernetes"
API_VERSION = "1.30"
WORKLOADS = ("Deployment", "StatefulSet", "Job")
Resource = dict[str, Any]


def documents(path: Path) -> list[Resource]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomization(name: str) -> Resource:
    (document,) = documents(KUBERNETES / name / "kustomization.yaml")
    return document


def base() -> dict[tuple[str, str], Resource]:
    """Return the resources of the base by kind and name."""
    found = [d for name in kustomization("base")["resources"] for d in documents(KUBERNETES / "base" / name)]
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def patched(resource: Resource, patch: Resource) -> Resource:
    """Merge as kustomize does: records by field, containers and their environment by name, other lists whole."""
    merged = dict(resource)
    for key, value in patch.items():
        if isinstance(value, dict):
            merged[key] = patched(resource.get(key, {}), value)
        elif key in ("containers", "env"):
            by_name = {entry["name"]: entry for entry in resource.get(key, [])}
            merged[key] = list((by_name | {e["name"]: patched(by_name.get(e["name"], {}), e) for e in value}).values())
        else:
            merged[key] = value
    return merged


def gpu() -> dict[tuple[str, str], Resource]:
    resources = base()
    for entry in kustomization("gpu")["patches"]:
        (patch,) = documents(KUBERNETES / "gpu" / entry["path"])
        key = patch["kind"], patch["metadata"]["name"]
        resources[key] = patched(resources[key], patch)
    return resources


@pytest.mark.parametrize("resources", [base(), gpu()], ids=["base", "gpu"])
def test_every_resource_fits_the_schema_of_its_kind(resources: dict[tuple[str, str], Resource]) -> None:
    for resource in resources.values():
        kubernetes_validate.validate(resource, API_VERSION, strict=True)


def test_the_pod_that_copies_has_the_volume_of_the_learner_and_its_user() -> None:
    (copy,) = documents(KUBERNETES / "copy.yaml")
    (learner,) = (pod for pod in pods(base()) if pod["containers"][0]["name"] == "learner")

    kubernetes_validate.validate(copy, API_VERSION, strict=True)
    assert copy["spec"]["securityContext"] == learner["securityContext"]
    assert copy["spec"]["volumes"][0] in learner["volumes"]
    assert copy["spec"]["containers"][0]["volumeMounts"][0] in learner["containers"][0]["volumeMounts"]


def pods(resources: dict[tuple[str, str], Resource]) -> list[Resource]:
    return [r["spec"]["template"]["spec"] for (kind, _), r in resources.items() if kind in WORKLOADS]


def containers(resources: dict[tuple[str, str], Resource]) -> dict[str, Resource]:
    return {container["name"]: container for pod in pods(resources) for container in pod["containers"]}


@pytest.mark.parametrize(
    ("resources", "env_file", "suffix"),
    [(base(), ".env", ""), (gpu(), "docker/gpu.env", "-gpu")],
    ids=["base", "gpu"],
)
def test_the_roles_run_the_commands_of_compose(
    resources: dict[tuple[str, str], Resource], env_file: str, suffix: str
) -> None:
    assert set(containers(resources)) == {"redis", "service", "learner", "actor"}
    for name, container in containers(resources).items():
        counterpart = COMPOSE["services"].get(name + suffix) or COMPOSE["services"][name]
        assert container["args"] == [resolved(part, variables(env_file)) for part in counterpart["command"]]
        given = {entry["name"]: entry["value"] for entry in container.get("env", []) if entry["name"] != "HF_HOME"}
        assert given.items() <= counterpart.get("environment", {}).items()


@pytest.mark.parametrize("resources", [base(), gpu()], ids=["base", "gpu"])
def test_no_pod_runs_as_root_or_may_become_more(resources: dict[tuple[str, str], Resource]) -> None:
    every = [container for pod in pods(resources) for container in pod.get("initContainers", []) + pod["containers"]]

    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods(resources))
    assert all(container["securityContext"]["capabilities"] == {"drop": ["ALL"]} for container in every)
    assert all(container["resources"]["limits"]["memory"] for container in every)


def test_learner_and_actors_on_gpus_find_the_model_that_an_init_container_fetched() -> None:
    recipe = load_config(REPOSITORY / variables("docker/gpu.env")["RECIPE"], environment={})
    loading = [pod for pod in pods(gpu()) if pod["containers"][0]["name"] in ("learner", "actor")]

    assert len(loading) == 2
    for pod in loading:
        (fetch,), (role,) = pod["initContainers"], pod["containers"]
        online = {"HF_HUB_OFFLINE": "0", "HF_HOME": "/app/runs/hf"}
        assert fetch["args"] == ["hf", "download", str(recipe.run.model)]
        assert {entry["name"]: entry["value"] for entry in fetch["env"]} == online
        assert fetch["image"] == role["image"]
        assert {"name": "HF_HOME", "value": online["HF_HOME"]} in role["env"]
        assert fetch["volumeMounts"][0] in role["volumeMounts"]
        assert online["HF_HOME"].startswith(fetch["volumeMounts"][0]["mountPath"])


def test_redis_has_twice_its_maxmemory() -> None:
    redis = containers(base())["redis"]
    gibibytes = int(redis["args"][redis["args"].index("--maxmemory") + 1].removesuffix("gb"))

    assert redis["resources"]["limits"]["memory"] == f"{2 * gibibytes}Gi"


@pytest.mark.parametrize(
    ("ends", "told_to_stop", "code"),
    [("raise SystemExit(0)", False, 0), ("raise SystemExit(3)", False, 3), ("signal.pause()", True, 143)],
    ids=["done", "failed", "drained"],
)
def test_the_job_of_the_learner_is_complete_when_the_learner_is_done_and_at_no_other_end(
    ends: str, told_to_stop: bool, code: int
) -> None:
    stops_cleanly = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(print('saved', flush=True)))"
    learner = [sys.executable, "-c", f"{stops_cleanly}; print('started', flush=True); {ends}"]

    command = [*containers(base())["learner"]["command"], *learner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        if told_to_stop:
            job.terminate()
        said = job.stdout.read()

    assert (job.returncode, said) == (code, "saved\n" if told_to_stop else "")
    assert base()["Job", "learner"]["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
