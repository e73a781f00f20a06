"""docs/settings.md says what the settings are today."""

import json
import re

from services.settings import RunConfig, describe
from tests.docs.settings_reference import HEAD, PAGE, reference


def test_the_page_is_what_the_generator_writes_now() -> None:
    assert PAGE.read_text() == reference(RunConfig.model_json_schema()), "run: python -m tests.docs.settings_reference"


def test_the_page_has_every_setting_with_its_default_and_a_meaning() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| `(.*)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    defaults = {name: json.loads(default) for name, default, _ in rows}

    for line in describe(RunConfig()).splitlines():
        name, _, value = line.partition(" = ")
        parent, _, field = name.rpartition(".")
        assert json.loads(value) == (defaults[name] if name in defaults else defaults[parent][field]), line


def test_the_head_says_of_every_section_who_reads_it() -> None:
    assert re.findall(r"^\| `(\w+)` \| ", HEAD, re.MULTILINE) == list(RunConfig.model_fields)
