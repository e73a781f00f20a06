"""All sections of settings in one record, and where they come from.

Later wins: defaults, the TOML file of --config, the environment (STALEWISE_TABLE__CAPACITY_GROUPS=1000), --set
table.capacity_groups=1000. STALEWISE_SERVICE__TOKEN_FILE=/run/secrets/token takes the value from a file, for secrets;
an empty variable is an unset one. Values outside TOML are TOML or JSON literals; bare words are strings, and so are
numbers where a text is wanted. Unknown keys are errors.
"""

import difflib
import json
import logging
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, JsonValue, SecretStr, ValidationError

from actor.settings import ActorSettings
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import InvalidRequest, InvalidSettings
from buffer.rate_limiter import RateLimiterSettings, check_draw, check_fresh_share, check_settings
from buffer.redis_server import RedisSettings
from buffer.selectors import check_weighting
from buffer.settings import Settings
from buffer.table import TableSettings
from buffer.types import Identifier
from buffer.weights.store import WeightStoreSettings
from learner.settings import LearnerSettings
from services.address import read_address
from services.context import ServiceSettings
from services.log_lines import LogSettings

log = logging.getLogger(__name__)

PREFIX = "STALEWISE_"
FILE_SUFFIX = "_FILE"


class RunSettings(Settings):
    """One training run of one model."""

    name: Identifier = "run"
    """Run id, and the name of its directory below runs_dir."""
    runs_dir: Path = Path("runs")
    """Where the directories of runs are."""
    model: Path = Path("models/running-sums")
    """Local model directory (config, tokenizer and, for the learner, the initial weights), or the name of a model that
    `hf download` has put into the local hub cache. Nothing is downloaded."""
    seed: int = 0
    """Seed of every random generator of the run."""

    @property
    def directory(self) -> Path:
        """The run's own directory."""
        return self.runs_dir / self.name


class DemoSettings(Settings):
    """What `stalewise demo` starts beside one service and one learner."""

    num_actors: Annotated[int, Field(ge=1)] = 2
    """Actor processes; with the learner they keep two cores busy."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often each process is started again when it dies; more deaths are a defect, not bad luck."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for the service to listen; imports take a few seconds on a busy machine."""


class RunConfig(Settings):
    """Every setting of every process of a run."""

    run: RunSettings = RunSettings()
    """Which run."""
    service: ServiceSettings = ServiceSettings()
    """The replay service, and how to reach it."""
    client: ClientSettings = ClientSettings()
    """How long learner and actors bear with an absent service."""
    redis: RedisSettings = RedisSettings()
    """What Redis promises."""
    table: TableSettings = TableSettings()
    """The replay table."""
    limiter: RateLimiterSettings = RateLimiterSettings()
    """Pacing between actors and learner."""
    weights: WeightStoreSettings = WeightStoreSettings()
    """Published weights, on the service's disk or in object storage."""
    learner: LearnerSettings = LearnerSettings()
    """The learner."""
    actor: ActorSettings = ActorSettings()
    """Each actor."""
    log: LogSettings = LogSettings()
    """What every process writes to stderr."""
    demo: DemoSettings = DemoSettings()
    """The demo."""


def load_config(
    path: Path | None, *, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> RunConfig:
    """Return the resolved settings.

    Raises InvalidSettings with one sentence that names the key, or the keys that cannot go together.
    """
    tree = _read_toml(path) if path else {}
    for name, text in _from_environment(environment or {}):
        _assign_text(tree, name.removeprefix(PREFIX).lower().split("__"), text, name)
    for key, text in _split(overrides):
        _assign_text(tree, key.split("."), text, key)
    _refuse_unknown(tree, source=path)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InvalidSettings(_fault(error)) from None
    _check_pacing(config)
    _check_evaluations(config)
    _check_sizes(config)
    return config


def parse_assignments(assignments: Sequence[str]) -> dict[str, JsonValue]:
    """Return what `key=value` texts of --set say, later ones winning. Raises InvalidSettings."""
    return {key: _literal(text, key) for key, text in _split(assignments)}


def describe(config: RunConfig) -> str:
    """Return the resolved settings as lines of `section.field = value`; tokens are masked."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in _leaves(config.model_dump(mode="json"), ()))


def log_settings(config: RunConfig) -> None:
    """Write the resolved settings to the log, one a line."""
    for line in describe(config).splitlines():
        log.info("setting %s", line)


def connect(config: RunConfig, *, stopping: threading.Event | None = None) -> ServiceClient:
    """Return a client of the run's service: service.url, else where service.json says it is, else host and port.

    `stopping` ends its retries.
    """
    service = config.service
    url = service.url or read_address(config.run.directory) or f"http://{service.host}:{service.port}"
    token = service.token.get_secret_value() if service.token else None
    return ServiceClient(url, token=token, settings=config.client, stopping=stopping)


def _check_evaluations(config: RunConfig) -> None:
    wishes = {"early_stop_evaluations": config.learner.early_stop_evaluations, "keep_best": config.learner.keep_best}
    for name, wish in wishes.items():
        if wish and config.actor.evaluation.every_updates is None:
            raise InvalidSettings(
                f"learner.{name}={json.dumps(wish)}, but nothing is evaluated",
                hint="set actor.evaluation.every_updates",
            )


def _check_sizes(config: RunConfig) -> None:
    if config.table.max_group_bytes > config.service.max_body_bytes:
        raise InvalidSettings(
            f"table.max_group_bytes={config.table.max_group_bytes} is above "
            f"service.max_body_bytes={config.service.max_body_bytes}: no request could bring such a group",
            hint="raise service.max_body_bytes to twice as much, or lower table.max_group_bytes",
        )


def _check_pacing(config: RunConfig) -> None:
    """Raise InvalidSettings when table, limiter and learner could block a run for ever together."""
    check_settings(config.table, config.limiter)
    learner = config.learner
    selectors = {"selector": learner.selector}
    if learner.replay_updates:
        selectors["replay_selector"] = learner.replay_selector
    for name, selector in selectors.items():
        try:
            check_weighting(selector, config.table.weighting)
            check_draw(learner.groups_per_update, selector, config.limiter)
        except InvalidRequest as error:
            raise InvalidSettings(
                f"learner.groups_per_update={learner.groups_per_update} by learner.{name} can never be served: "
                f"{error.detail}",
                hint=error.hint,
            ) from None
    cycle = [learner.selector] + learner.replay_updates * [learner.replay_selector]
    check_fresh_share(learner.groups_per_update, cycle, config.limiter)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"cannot read {path}: {error.strerror}", hint="give --config an existing file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path} is not TOML: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables that are settings; NAME_FILE is NAME with the text of that file, less its last newline."""
    for name, text in sorted(environment.items()):
        if not name.startswith(PREFIX) or not text:
            continue
        setting = name.removesuffix(FILE_SUFFIX)
        if setting != name:
            if environment.get(setting):
                raise InvalidSettings(f"both {setting} and {name} are set", hint="set one of them")
            text = _read_value(Path(text), name)
        yield setting, text


def _read_value(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{name}={path} cannot be read: {error}", hint="mount the secret, or unset it") from error


def _split(assignments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InvalidSettings(f"--set {assignment} is not key=value", hint="write for example --set table.ttl_s=60")
        yield key.strip(), text


def _assign_text(tree: dict[str, Any], keys: Sequence[str], text: str, source: str) -> None:
    """Assign what a text means; where the setting is a text itself, numbers and dates stay as they were written."""
    value = _literal(text, source)
    if _takes_text(keys) and not isinstance(value, str | list | dict | bool | None):
        value = text
    _assign(tree, keys, value, source)


def _takes_text(keys: Sequence[str]) -> bool:
    annotation: object = RunConfig
    for key in keys:
        section = _section(annotation)
        if section is None or key not in section.model_fields:
            return False
        annotation = section.model_fields[key].annotation
    return _is_text(annotation)


def _is_text(annotation: object) -> bool:
    return annotation in (str, SecretStr, Path) or any(_is_text(part) for part in get_args(annotation))


def _literal(text: str, source: str) -> JsonValue:
    """Return what a text outside TOML means: a TOML literal, a JSON literal, or the text itself if a bare word."""
    try:
        value: JsonValue = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith(("[", "{", '"', "'")):
                raise InvalidSettings(f"{source}: {text} is neither a TOML nor a JSON value: {error}") from None
            value = text
    return value


def _assign(tree: dict[str, Any], keys: Sequence[str], value: JsonValue, source: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InvalidSettings(f"{source} goes below {key}, which is set to a plain value")
    tree[keys[-1]] = value


def _refuse_unknown(tree: Mapping[str, Any], *, source: Path | None) -> None:
    """Raise InvalidSettings for a key that no section has, with the closest ones."""
    known = dict(_known_keys(RunConfig, ()))
    for key in _given_keys(tree, (), known):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            place = f" (in {source}, the environment or --set)" if source else ""
            raise InvalidSettings(
                f"unknown setting {key}{place}", hint=f"did you mean {' or '.join(close)}?" if close else ""
            )


def _known_keys(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yield each dotted key, and whether it is a section, whose keys are all known."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        yield ".".join((*above, name)), section is not None
        if section is not None:
            yield from _known_keys(section, (*above, name))


def _section(annotation: object) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _given_keys(tree: Mapping[str, Any], above: tuple[str, ...], known: Mapping[str, bool]) -> Iterator[str]:
    """Yield the dotted keys that were given, down to the values that are not sections."""
    for name, value in tree.items():
        key = ".".join((*above, name))
        yield key
        if known.get(key, False) and isinstance(value, Mapping):
            yield from _given_keys(value, (*above, name), known)


def _fault(error: ValidationError) -> str:
    """Return the first fault as a sentence that names the key; the value too, unless it may be a secret."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    shown = (
        "" if first["type"] == "value_error" or "token" in key else f", got {json.dumps(first['input'], default=str)}"
    )
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...]) -> Iterable[tuple[str, JsonValue]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield ".".join((*above, name)), value
