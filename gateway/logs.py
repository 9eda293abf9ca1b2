"""Structured logs on standard error: one line an event, and never any content.

Events go through the standard library's logging, as those of other libraries do; of these, warnings and worse are let through.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

_logger = logging.getLogger("holdgate")


def info(event: str, /, **fields: object) -> None:
    """Log an event, named in words_like_these, with what there is to know of it."""
    _log(logging.INFO, event, fields)


def warning(event: str, /, **fields: object) -> None:
    """Log an event that somebody should look at."""
    _log(logging.WARNING, event, fields)


def error(event: str, raised: BaseException | None = None, /, **fields: object) -> None:
    """Log an event that somebody must look at; an exception with where it was raised."""
    _log(logging.ERROR, event, fields, raised)


def _log(
    level: int, event: str, fields: dict[str, object], raised: BaseException | None = None
) -> None:
    if _logger.isEnabledFor(level):
        _logger.log(level, event, exc_info=raised, extra={"fields": fields})


class _Line(logging.Formatter):
    """An event as one line: a JSON object, or words for people."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        level = record.levelname.lower()
        at = datetime.fromtimestamp(record.created, UTC).isoformat().removesuffix("+00:00") + "Z"
        said = {"event": record.getMessage(), "level": level, "timestamp": at, **fields}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        if self._is_json:
            return orjson.dumps(said, default=str).decode()
        raised = said.pop("exception", None)
        words = [f"{name}={value!r}" for name, value in fields.items()]
        line = " ".join((at, f"{level:7}", str(said["event"]), *words))
        return f"{line}\n{raised}" if raised else line


def configure(level: str, form: str) -> None:
    """Send logs to standard error: `json`, or `console` for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(is_json=form == "json"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    _logger.setLevel(level.upper())
