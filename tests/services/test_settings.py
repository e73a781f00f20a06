"""Settings: four sources in rising priority, and one sentence for every bad key or value."""

import subprocess
import sys
from pathlib import Path

import pytest

from buffer.errors import InvalidSettings
from services.address import write_address
from services.settings import RunConfig, connect, describe, load_config
from tests.services.live import stalewise

REVAL_SCHEDULE = [
    "limiter.samples_per_insert=4",
    "learner.selector={kind = 'fresh'}",
    "learner.replay_updates=3",
]
"""One fresh update, then three replayed ones."""


def test_later_sources_win(tmp_path: Path) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text("[table]\ncapacity_groups = 100\ncapacity_bytes = 11\nreuse_limit = 12\n")
    environment = {"STALEWISE_TABLE__CAPACITY_BYTES": "21", "STALEWISE_TABLE__REUSE_LIMIT": "22", "PATH": "/bin"}

    config = load_config(toml, overrides=["table.reuse_limit=32"], environment=environment)

    table = config.table
    assert (table.capacity_groups, table.capacity_bytes, table.reuse_limit, table.ttl_s) == (100, 21, 32, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("table.max_age_updates=null", "table.max_age_updates = null"),
        ("run.name=2026", 'run.name = "2026"'),
        ("run.name=2026-11-21", 'run.name = "2026-11-21"'),
        ("run.runs_dir=007", 'run.runs_dir = "007"'),
        ("service.token=12345678", 'service.token = "**********"'),
        ("service.tokens.admin=1234567890", 'service.tokens.admin = ["**********"]'),
        ("service.redis_url=redis://me:a/b@host:6379/1", 'service.redis_url = "redis://me:***@host:6379/1"'),
        ("service.redis_url=unix:///s?db=1&password=a&x=y", 'service.redis_url = "unix:///s?db=1&password=***&x=y"'),
        ("service.redis_url=redis://redis:6379/0", 'service.redis_url = "redis://redis:6379/0"'),
        ("service.url=null", "service.url = null"),
        ("run.name=demo-1", 'run.name = "demo-1"'),
        ('run.name="demo 1"'.replace(" ", ""), 'run.name = "demo1"'),
        ("limiter.error_buffer=1e6", "limiter.error_buffer = 1000000.0"),
        ("learner.optimizer.betas=[0.5, 0.75]", "learner.optimizer.betas = [0.5, 0.75]"),
        ('learner.selector={kind = "mix", fresh = 0.5}', "learner.selector.fresh = 0.5"),
        ('learner.selector={"kind": "mix", "fresh": 0.5}', 'learner.selector.rest.kind = "uniform"'),
        ("actor.task.options.num_digits=3", "actor.task.options.num_digits = 3"),
    ],
)
def test_values_are_toml_or_json_or_bare_words(override: str, expected: str) -> None:
    assert expected in describe(load_config(None, overrides=[override])).splitlines()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "table.capcity_groups=3",
            "unknown setting table.capcity_groups (did you mean table.capacity_groups or table.capacity_bytes or ",
        ),
        ("learner.keep_best=true", "learner.keep_best=true, but nothing is evaluated (set actor.evaluation.every_"),
        ("learner.early_stop_evaluations=3", "learner.early_stop_evaluations=3, but nothing is evaluated (set actor."),
        ("tabel.ttl_s=1", "unknown setting tabel (did you mean table or table.ttl_s?)"),
        (
            "table.capacity_groups=many",
            'table.capacity_groups: input should be a valid integer, unable to parse string as an integer, got "many"',
        ),
        ("service.port=99999", "service.port: input should be less than or equal to 65535, got 99999"),
        (
            "limiter.error_buffer=1",
            "limiter: error_buffer=1 must be at least 2 (2 x max(1, samples_per_insert)): smaller values can block "
            "insert and sample for ever",
        ),
        (
            "learner.groups_per_update=17",
            "learner.groups_per_update=17 by learner.selector can never be served: num_groups=17 is above "
            "limiter.min_size=16: the table need not ever hold that many groups (raise min_size to at least 17)",
        ),
        ("table.capacity_groups=15", "limiter.min_size=16 is above table.capacity_groups=15"),
        ("table.ttl_s=[1", "table.ttl_s: [1 is neither a TOML nor a JSON value"),
        ("table=3", "table: input should be a valid dictionary or instance of TableSettings, got 3"),
        ("run.name.first=x", 'run.name: input should be a valid string, got {"first": "x"}'),
        ("table.ttl_s", "--set table.ttl_s is not key=value (write for example --set table.ttl_s=60)"),
        (
            "table.max_group_bytes=200000000",
            "table.max_group_bytes=200000000 is above service.max_body_bytes=134217728: no request could bring such a",
        ),
        ("weights.store=gs://b", "weights.store: want directory or s3://bucket/prefix, got gs://b"),
        ("weights.store=s3://Weights", "weights.store: want directory or s3://bucket/prefix, got s3://Weights"),
        (
            "weights.store=s3://id:short@bucket",
            "weights.store: want directory or s3://bucket/prefix, and credentials in the environment alone",
        ),
        (
            "weights.s3_endpoint=https://id:short@host",
            "weights.s3_endpoint: want http://host:port or https://host, without a path, and credentials in the",
        ),
        (
            "weights.s3_endpoint=minio:9000",
            "weights.s3_endpoint: want http://host:port or https://host, without a path, got minio:9000",
        ),
        ("service.tokens.read=short", "service.tokens.read.0: value should have at least 8 items after validation"),
    ],
)
def test_bad_setting_is_one_sentence_that_names_it_and_shows_no_token(override: str, sentence: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load_config(None, overrides=[override])

    assert str(caught.value).startswith(sentence)
    assert "short" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_replayed_draws_must_be_possible_too() -> None:
    weighted = ["learner.replay_selector={kind = 'weighted', by = 'recency'}"]

    load_config(None, overrides=weighted)
    with pytest.raises(
        InvalidSettings, match=r"by learner\.replay_selector can never be served: the draw is weighted by"
    ):
        load_config(None, overrides=[*weighted, "learner.replay_updates=1"])


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        (["limiter.samples_per_insert=2", "learner.selector={kind = 'fresh'}"], ("100%", "50%")),
        (["limiter.samples_per_insert=2", "learner.selector={kind = 'mix', fresh = 0.75}"], ("75%", "50%")),
        (["limiter.samples_per_insert=4", "learner.replay_selector={kind = 'mix', fresh = 0.5}"], None),
        (
            [
                "limiter.samples_per_insert=5",
                "learner.replay_selector={kind = 'mix', fresh = 0.5}",
                "learner.replay_updates=1",
            ],
            ("25%", "20%"),
        ),
        (REVAL_SCHEDULE, None),
        ([*REVAL_SCHEDULE, "limiter.samples_per_insert=4.5"], ("25%", "22%")),
    ],
)
def test_draws_may_want_as_many_fresh_groups_as_come_in(overrides: list[str], shares: tuple[str, str] | None) -> None:
    if shares is None:
        load_config(None, overrides=overrides)
        return
    with pytest.raises(InvalidSettings) as caught:
        load_config(None, overrides=overrides)

    assert caught.value.detail.startswith(f"{shares[0]} of what the learner draws must be fresh")
    assert caught.value.detail.endswith(f"only {shares[1]} can be")


@pytest.mark.parametrize("command", ["serve", "learn", "act", "demo"])
def test_every_process_refuses_settings_that_would_block_the_run(command: str, tmp_path: Path) -> None:
    done = stalewise(command, "--set", f"run.runs_dir={tmp_path}", "--set", "learner.groups_per_update=1000")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stalewise: learner.groups_per_update=1000 by learner.selector can never be served")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["STALEWISE_TABLE__CAPCITY_GROUPS", "STALEWISE_TOKEN"])
def test_unknown_variable_of_ours_is_refused(name: str) -> None:
    with pytest.raises(InvalidSettings, match="unknown setting"):
        load_config(None, environment={name: "1"})


def test_bad_files_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[table\n")

    with pytest.raises(InvalidSettings, match=r"cannot read .*absent.toml: No such file or directory"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(InvalidSettings, match=r"bad.toml is not TOML: Expected ']'"):
        load_config(tmp_path / "bad.toml")


def test_description_names_every_setting_and_masks_tokens() -> None:
    lines = describe(load_config(None, overrides=["service.tokens.admin=very-secret", "service.token=very-secret"]))

    assert {line.split(".")[0] for line in lines.splitlines()} == set(RunConfig.model_fields)
    assert "very-secret" not in lines
    assert 'service.token = "**********"' in lines


def test_address_is_the_setting_then_the_living_service_then_host_and_port(tmp_path: Path) -> None:
    runs = f"run.runs_dir={tmp_path}"
    (tmp_path / "run").mkdir()
    default = connect(load_config(None, overrides=[runs])).url
    write_address(tmp_path / "run", "http://127.0.0.1:5")
    living = connect(load_config(None, overrides=[runs])).url
    given = connect(load_config(None, overrides=[runs, "service.url=http://elsewhere:1/"])).url
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "run" / "service.json").write_text(f'{{"url": "http://127.0.0.1:5", "pid": {dead.pid}}}')
    after_a_kill = connect(load_config(None, overrides=[runs])).url

    assert [default, living, given, after_a_kill] == [
        "http://127.0.0.1:8642",
        "http://127.0.0.1:5",
        "http://elsewhere:1",
        "http://127.0.0.1:8642",
    ]


def test_reading_settings_imports_neither_torch_nor_a_server() -> None:
    code = (
        "import sys, services.settings; print(sorted({'torch', 'transformers', 'fastapi', 'vllm'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
