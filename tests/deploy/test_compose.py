"""What docker-compose.yml starts works: its very commands and health checks, as processes; then what it promises."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from buffer.connection import ServiceClient
from buffer.errors import Forbidden
from buffer.redis_memory import most_memory_bytes
from buffer.table import TableSettings
from services.settings import load_config
from tests.deploy.compose import COMPOSE, REPOSITORY, machine, profile, resolved, variables

PROFILES = ("cpu", "gpu", "monitoring")


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_commands_of_the_cpu_profile_train_and_every_health_check_passes(tmp_path: Path) -> None:
    with machine(tmp_path) as engine:
        engine.start("tokens")
        engine.wait_until(lambda: engine.running["tokens"].poll() == 0)
        for name in ("redis", "service"):
            engine.start(name)
            engine.wait_until(lambda name=name: engine.is_healthy(name))  # type: ignore[misc]  # a default argument
        for name in ("learner", "actor"):
            engine.start(name)
        with closing(ServiceClient(engine.url, token=engine.token("read"))) as reader:
            engine.wait_until(lambda: ((reader.stats()["learner"] or {}).get("updates") or 0) >= 2)

        assert all(engine.is_healthy(name) for name in ("learner", "actor"))
        with closing(ServiceClient(engine.url, token=engine.token("act"))) as actor, pytest.raises(Forbidden):
            actor.stats()
        ends = {name: engine.running[name] for name in ("actor", "learner", "service")}
        for process in ends.values():
            process.terminate()
            assert process.wait(60) == 0
    assert "checkpoint" in engine.log("learner")


@pytest.mark.parametrize(
    ("env_file", "roles", "run"),
    [(".env", {"learner", "actor"}, "demo"), ("docker/gpu.env", {"learner-gpu", "actor-gpu"}, "gpu")],
)
def test_the_roles_that_an_env_file_starts_are_four_and_read_one_recipe(
    env_file: str, roles: set[str], run: str
) -> None:
    given = variables(env_file)
    services = profile(given["COMPOSE_PROFILES"])
    commands = {name: resolved(" ".join(service["command"]), given) for name, service in services.items()}
    recipes = {name: found[1] for name, text in commands.items() if (found := re.search(r"--config (\S+)", text))}

    assert set(services) == {"tokens", "redis", "service", *roles}
    assert set(recipes) == {"service", *roles}
    (recipe,) = set(recipes.values())
    assert load_config(REPOSITORY / recipe, environment={}).run.name == run
    mounts = {"./recipes:/app/recipes:ro", "./models:/app/models:ro"}
    assert all(mounts <= set(services[name]["volumes"]) for name in recipes)


def test_redis_may_take_what_a_table_of_the_default_size_takes_at_most() -> None:
    command = COMPOSE["services"]["redis"]["command"]
    gibibytes = int(command[command.index("--maxmemory") + 1].removesuffix("gb"))

    assert gibibytes << 30 > most_memory_bytes(TableSettings(), 1)
    assert COMPOSE["services"]["redis"]["deploy"]["resources"]["limits"]["memory"] == f"{2 * gibibytes}g"


@pytest.mark.parametrize(
    ("given", "gpus"), [({}, {"0", "1"}), ({"LEARNER_GPU": "3", "ACTOR_GPU": "2"}, {"3", "2"})], ids=["default", "own"]
)
def test_learner_and_actor_get_a_gpu_each(given: dict[str, str], gpus: set[str]) -> None:
    files = {"COMPOSE_PROFILES": "gpu"} | {k: v for k, v in variables("docker/gpu.env").items() if k.endswith("_GPU")}
    asked = [
        resolved(device, files | given)
        for service in profile("gpu").values()
        for entry in service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ())
        for device in entry["device_ids"]
    ]

    assert (set(asked), len(asked)) == (gpus, 2)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_no_capabilities_and_one_that_stays_a_health_check_a_limit_and_no_port_beyond_loopback(
    name: str,
) -> None:
    service = COMPOSE["services"][name]

    assert name == "tokens" or "healthcheck" in service
    assert name == "tokens" or service["deploy"]["resources"]["limits"]["memory"]
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert all(needed in COMPOSE["services"] for needed in service.get("depends_on", {}))


def test_every_setting_of_the_file_exists_and_redis_promises_what_the_service_is_told(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-the-test\n")
    for name, service in COMPOSE["services"].items():
        given = service.get("environment", {})
        environment = {k: str(tmp_path / "token") if k.endswith("_FILE") else resolved(v) for k, v in given.items()}
        recipe = re.search(r"recipes/\w+\.toml", resolved(" ".join(service.get("command", []))))

        config = load_config(REPOSITORY / recipe[0] if recipe else None, environment=environment)

        if name == "service":
            redis = COMPOSE["services"]["redis"]["command"]
            assert redis[redis.index("--appendfsync") + 1] == config.redis.appendfsync
            assert all(config.service.tokens.by_role().values())


@pytest.mark.parametrize("name", PROFILES)
def test_compose_itself_accepts_every_profile(name: str) -> None:
    if shutil.which("docker-compose") is None:
        assert not os.environ.get("CI"), "CI has to check the compose file: apt-get install docker-compose"
        pytest.skip("no docker-compose here: apt-get install docker-compose")
    for files in (("docker-compose.yml",), ("docker-compose.yml", "docker/compose.secrets.yml")):
        options = [part for file in files for part in ("-f", file)]
        checked = subprocess.run(
            ["docker-compose", *options, "config", "-q"],
            cwd=REPOSITORY,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "COMPOSE_PROFILES": name, "ADMIN_TOKEN_FILE": "token"},
            capture_output=True,
            text=True,
            check=False,
        )

        assert (checked.returncode, checked.stderr) == (0, "")


def test_images_are_pinned_and_run_as_nobody_special() -> None:
    for path in sorted((REPOSITORY / "docker").glob("Dockerfile*")):
        text = path.read_text()
        bases = [base for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if ":" in base]

        assert bases
        assert not [base for base in bases if base.endswith(":latest")]
        assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "1000:1000"


def test_the_dockerfiles_pass_their_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    files = sorted(map(str, (REPOSITORY / "docker").glob("Dockerfile*")))

    checked = subprocess.run([hadolint, *files], capture_output=True, text=True, check=False)

    assert (checked.returncode, checked.stdout) == (0, "")
