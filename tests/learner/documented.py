"""The names of docs/metrics.md, read as patterns."""

import re
from collections.abc import Iterable
from pathlib import Path

_TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def parts() -> dict[str, list[str]]:
    """What each {part} of a name may be; "" where the table says `nothing`."""
    rows = re.findall(r"^\| `\{(\w+)\}` \| (.*) \|$", _TEXT, re.MULTILINE)
    return {name: [""] * cell.startswith("nothing") + re.findall(r"`(\w+)`", cell) for name, cell in rows}


def patterns() -> list[str]:
    """The documented names, {parts} and all."""
    return re.findall(r"^\| `(\w+/[\w{}]+)` \| .+ \|$", _TEXT, re.MULTILINE)


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that no row of the table describes."""
    known = [_regex(pattern) for pattern in patterns()]
    return sorted(name for name in names if not any(regex.fullmatch(name) for regex in known))


def never_seen(names: Iterable[str]) -> list[str]:
    """Rows of the table that describe none of `names`."""
    seen = list(names)
    return [pattern for pattern in patterns() if not any(_regex(pattern).fullmatch(name) for name in seen)]


def _regex(pattern: str) -> re.Pattern[str]:
    choices = {f"{{{name}}}": f"({'|'.join(values)})" for name, values in parts().items()}
    return re.compile("".join(choices.get(piece, piece) for piece in re.split(r"(\{\w+\})", pattern)))
