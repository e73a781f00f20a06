"""The Kubernetes example is valid by the API's own schemas, and starts what docker-compose.yml starts."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.compose import COMPOSE, REPOSITORY, resolved, variables

KUBERNETES = REPOSITORY / "deploy/kubernetes"
API_VERSION = "1.30"
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


def containers(resources: dict[tuple[str, str], Resource]) -> dict[str, Resource]:
    return {
        container["name"]: container
        for (kind, _), resource in resources.items()
        if kind in ("Deployment", "StatefulSet")
        for container in resource["spec"]["template"]["spec"]["containers"]
    }


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
        model = {"HF_HUB_OFFLINE", "HF_HOME"}  # compose mounts the user's cache
        given = {entry["name"]: entry["value"] for entry in container.get("env", []) if entry["name"] not in model}
        assert given.items() <= counterpart.get("environment", {}).items()


@pytest.mark.parametrize("resources", [base(), gpu()], ids=["base", "gpu"])
def test_no_pod_runs_as_root_or_may_become_more(resources: dict[tuple[str, str], Resource]) -> None:
    pods = [
        r["spec"]["template"]["spec"] for (kind, _), r in resources.items() if kind in ("Deployment", "StatefulSet")
    ]

    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    assert all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for pod in pods for c in pod["containers"])
    assert all(c["resources"]["limits"]["memory"] for pod in pods for c in pod["containers"])
