"""Writes docs/settings.md from the settings and their docstrings: `python -m tests.docs.settings_reference`."""

import json
from collections.abc import Iterator
from pathlib import Path

from services.settings import RunConfig
from tests.docs.rest_reference import Schema, record_of, text_of, type_of

PAGE = Path(__file__).parents[2] / "docs/settings.md"
HEAD = """# Settings

Generated from the settings' own fields and docstrings by `python -m tests.docs.settings_reference`; a test holds it
against the code. `stalewise settings` takes what the other commands take (`--config`, `--set`, the environment) and
prints every resolved value, secrets masked; an unknown name is refused, with the nearest that exist.

Later wins:

1. the defaults below;
2. the TOML file of `--config`: `[limiter]`, then `min_size = 320`;
3. the environment: `STALEWISE_LIMITER__MIN_SIZE=320`; with `_FILE` after the name the value is the text of a file, for
   secrets: `STALEWISE_SERVICE__TOKEN_FILE=/run/secrets/token`. An empty variable is an unset one;
4. `--set limiter.min_size=320`, as often as needed.

Values outside the file are TOML or JSON literals (`--set 'learner.selector={kind = "mix", fresh = 0.5}'`), bare words
are texts. null and None are one thing; TOML has no word for it: leave the setting out, or `--set table.ttl_s=null`.

Give every process of a run the same settings: each checks at start that they fit together and reads what is its own.
What may differ is where a process is and who it is: `service.url` and `token`, `learner.device`, `run.runs_dir`, `log`.

| section | who reads it |
|---|---|
| `run` | every process |
| `service` | `serve`; its clients read `url`, `token`, `host` and `port`, `learn` also `redis_url` and \
`samples_from_redis` |
| `client` | `learn`, `act`, `stats` and whoever else calls the service |
| `redis` | `serve` |
| `table` | `serve`; `learn` reads `max_age_updates`, with `samples_from_redis` all of it; `act` reads `solved_reward` |
| `limiter` | `serve`; `learn` with `samples_from_redis` |
| `weights` | `serve` |
| `learner` | `learn` |
| `actor` | `act`; `serve-vllm` reads `vllm`, `learn` reads `evaluation.every_updates` |
| `log` | every process |
| `demo` | `demo` |

"""


def reference(schema: Schema) -> str:
    """Return the page."""
    shown: set[str] = set()
    sections = "".join(_section(schema, (), "", {}, schema["$defs"], shown))
    values = {name: part for name, part in schema["$defs"].items() if name not in shown and "properties" in part}
    records = "\n".join(record_of(name, part) for name, part in sorted(values.items()))
    return f"{HEAD}{sections}## Values with fields of their own\n\n{records}"


def _section(
    section: Schema, above: tuple[str, ...], said: str, defaults: Schema, known: Schema, shown: set[str]
) -> Iterator[str]:
    """Yield what is said of a section, its table, then the sections in it; `shown` gets the records that they are."""
    parts = {name: of["$ref"].rpartition("/")[2] for name, of in section["properties"].items() if "$ref" in of}
    plain = {name: of for name, of in section["properties"].items() if name not in parts}
    if above:
        yield f"{'#' * min(3, 1 + len(above))} {'.'.join(above)}\n\n"
        yield " ".join(dict.fromkeys((said, text_of(section)))) + "\n\n"
    if plain:
        yield "| setting | type and bounds | default | meaning |\n|---|---|---|---|\n"
        for name, of in plain.items():
            default = json.dumps(defaults.get(name, of.get("default", {})))  # no default: made anew, {} in all cases
            yield f"| `{'.'.join((*above, name))}` | {type_of(of)} | `{default}` | {text_of(of)} |\n"
        yield "\n"
    for name, part in parts.items():
        of = section["properties"][name]
        shown.add(part)
        yield from _section(known[part], (*above, name), text_of(of), of.get("default", {}), known, shown)


if __name__ == "__main__":
    PAGE.write_text(reference(RunConfig.model_json_schema()))
