"""The log: one line a record, for people or for machines, with the run, the request and what it is about."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from buffer.request_id import current_request_id
from buffer.settings import Settings

_SUBJECTS = ("version", "group_id", "actor_id")
"""What a record may be about, given as `extra` to the logging call."""


class LogSettings(Settings):
    """What the processes of a run write to stderr."""

    format: Literal["plain", "json"] = "plain"
    """`plain` reads well in a terminal; `json` is one object a line, for a log collector."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least serious records that are written; DEBUG has one line for each request."""


def set_up_logging(settings: LogSettings, *, run_id: str) -> None:
    """Write records to stderr from now on, in place of what was set up before."""
    formatter: logging.Formatter = JsonLines(run_id) if settings.format == "json" else PlainLines(run_id)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    for name in ("httpx", "httpcore"):  # one line a request is too many
        logging.getLogger(name).setLevel(logging.WARNING)


class PlainLines(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO services.serve [run=demo request=4f...]: serving on ...`"""

    def __init__(self, run_id: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s%(about)s: %(message)s")
        self._run_id = run_id

    def format(self, record: logging.LogRecord) -> str:
        """Return the one line of a record; line breaks in it are escaped."""
        about = ({"run": self._run_id} if self._run_id else {}) | _about(record)
        record.about = f" [{' '.join(f'{name}={value}' for name, value in about.items())}]" if about else ""
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


class JsonLines(logging.Formatter):
    """`{"time": "2026-01-31T12:00:00.123+00:00", "level": "INFO", "logger": ..., "message": ..., "run_id": ...}`"""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON object of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run_id": self._run_id,
            **_about(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _about(record: logging.LogRecord) -> dict[str, object]:
    given = vars(record)
    about = {name: given[name] for name in _SUBJECTS if name in given}
    request_id = current_request_id()
    return {"request_id": request_id, **about} if request_id else about
