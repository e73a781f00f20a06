"""One line a record, with what it is about, for people or for machines."""

import json
import logging

import httpx
import pytest

from buffer.request_id import HEADER, request_scope
from services.log_lines import JsonLines, PlainLines
from tests.services.live import stalewise


def record(message: str, **about: object) -> logging.LogRecord:
    made = logging.getLogger("a.b").makeRecord("a.b", logging.WARNING, "f", 1, message, (), None, extra=about)
    made.created = 1_800_000_000.5
    return made


def test_json_line_has_run_request_and_subject() -> None:
    with request_scope("r-1"):
        line = JsonLines("demo").format(record('a "b"\nc', version=3, group_id="g", other=1))

    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.500+00:00",
        "level": "WARNING",
        "logger": "a.b",
        "message": 'a "b"\nc',
        "run_id": "demo",
        "request_id": "r-1",
        "version": 3,
        "group_id": "g",
    }
    assert "\n" not in line


def test_plain_line_is_one_line_too() -> None:
    line = PlainLines("demo").format(record("a\nb", version=0))

    assert line.endswith(r"WARNING a.b [run=demo version=0]: a\nb")
    assert PlainLines("").format(record("a")).endswith("WARNING a.b: a")


def test_exceptions_stay_on_the_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        made = record("it broke")
        made.exc_info = (ValueError, error, error.__traceback__)

    assert "\n" not in PlainLines("demo").format(made)
    assert json.loads(JsonLines("demo").format(made))["exception"].endswith("ValueError: first\nsecond")


def test_service_says_who_sent_nonsense_under_the_request_s_id(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JsonLines("demo"))
    body = {"schema": 1, "groups": [{"group_id": "bad"}, {"group_id": "worse"}]}
    http.post("/v1/groups", json=body, headers={HEADER: "r-2"})

    line = json.loads(caplog.text.splitlines()[0])
    assert (line["group_id"], line["request_id"], line["run_id"]) == ("bad", "r-2", "demo")
    assert line["message"].startswith("2 of 2 are refused, the first as invalid: ")


def test_processes_write_the_chosen_format_from_their_settings_on() -> None:
    options = ("log.format=json", "run.name=demo", "service.host=203.0.113.1", "service.tokens.admin=long-enough")
    ended = stalewise("serve", *(part for option in options for part in ("--set", option)), timeout_s=110)

    lines = [json.loads(line) for line in ended.stderr.splitlines()[:-1]]  # the last one is the error itself
    assert {line["run_id"] for line in lines} == {"demo"}
    assert 'setting log.format = "json"' in {line["message"] for line in lines}
