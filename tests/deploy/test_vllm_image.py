"""The actor's image on vLLM's holds what `stalewise act` imports, though it installs none of our dependencies."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "docker/Dockerfile.vllm").read_text()

VLLM_DECLARES = ("numpy", "transformers", "huggingface_hub", "tokenizers", "safetensors", "pydantic", "torch")
"""What vllm 0.33.0 names in its Requires-Dist, as far as we use it ourselves; the rest of its list we do not need."""

ACT = """
import sys

class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, NotInTheImage())
if sys.argv[1] == "act":
    from services.cli import main
    main()
else:
    import actor.tasks, actor.vllm.fetching, actor.vllm.remote, actor.vllm.sampling, actor.vllm.server, reasoning_gym
"""


def pins() -> dict[str, str]:
    """Return the versions that the image installs by name."""
    return dict(re.findall(r"([\w-]+)==(\S+)", DOCKERFILE))


def with_what_they_need(names: Iterable[str]) -> set[str]:
    """Return distributions and all that they require here, extras left out."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # asked for on another platform
            continue
        found.add(name)
        wanted = map(Requirement, requirements)
        left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def missing_modules() -> str:
    """Return the importable names of our own requirements, those of extras and tests too, that the image lacks."""
    ours = {canonicalize_name(Requirement(text).name) for text in distribution("stalewise").requires or []}
    lacking = ours - with_what_they_need((*VLLM_DECLARES, *pins()))
    return ",".join(
        module
        for module, owners in packages_distributions().items()
        if not lacking.isdisjoint(map(canonicalize_name, owners))
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["act", "--config", "recipes/demo.toml", "--engine", "vllm"], 3, "no answer from http://127.0.0.1:9"),
        (["the modules of its engine and of a generated task"], 0, ""),
    ],
    ids=["act", "engine"],
)
def test_an_actor_imports_nothing_that_its_image_lacks(arguments: list[str], code: int, said: str) -> None:
    nobody = ["--set", "service.url=http://127.0.0.1:9", "--set", "client.retry_budget_s=0"] if code else []

    ended = subprocess.run(
        [sys.executable, "-c", ACT, missing_modules(), *arguments, *nobody],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "No module named" not in ended.stderr
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr


def test_the_image_has_the_versions_that_the_vllm_environment_is_tested_with() -> None:
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints-vllm.txt").read_text(), re.MULTILINE))
    by_name = {canonicalize_name(name): version for name, version in tested.items()}

    assert {name: by_name.get(canonicalize_name(name)) for name in pins()} == pins()
