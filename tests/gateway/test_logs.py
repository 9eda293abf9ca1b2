"""Logs: one line an event, whoever logs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys, warnings
from gateway import logs
logs.configure(sys.argv[1], sys.argv[2])
logs.info("told", number=1, text="two\\nlines", thing=object)
logs.warning("minded")
try:
    1 / 0
except ZeroDivisionError as error:
    logs.error("broke", error, work="division")
logging.getLogger("a.library").info("chatter")
logging.getLogger("a.library").warning("a %s", "warning")
warnings.warn("old", DeprecationWarning)
"""


def lines(level: str, form: str) -> list[str]:
    """What a process that logs so writes to standard error."""
    command = [sys.executable, "-W", "always", "-c", SCRIPT, level, form]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()


def test_each_event_is_one_json_object_with_level_and_time() -> None:
    told = [json.loads(line) for line in lines("info", "json")]
    assert all(each["timestamp"].endswith("Z") for each in told)
    assert [(each["event"], each["level"]) for each in told[:4]] == [
        ("told", "info"),
        ("minded", "warning"),
        ("broke", "error"),
        ("a warning", "warning"),
    ]
    assert (told[0]["number"], told[0]["text"]) == (1, "two\nlines")
    assert told[2]["work"] == "division"
    assert told[2]["exception"].endswith("ZeroDivisionError: division by zero")
    assert "DeprecationWarning: old" in told[4]["event"]
    assert len(told) == 5


@pytest.mark.parametrize(("level", "events"), [("warning", 4), ("error", 3)])
def test_level_is_that_of_our_own_events(level: str, events: int) -> None:
    assert len(lines(level, "json")) == events


def test_for_people_an_event_is_a_line_of_words() -> None:
    said = lines("info", "console")
    assert "info    told number=1 text='two\\nlines'" in said[0]
    assert said[-4:-2] != said[-2:]
    assert any(line.endswith("ZeroDivisionError: division by zero") for line in said)
