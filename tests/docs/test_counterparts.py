"""docs/counterparts.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_the_page_names_is_there() -> None:
    page = (TESTS.parent / "docs" / "counterparts.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)

    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()]

    assert len(named) > 40
    assert not missing
