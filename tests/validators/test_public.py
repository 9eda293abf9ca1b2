"""What the package offers."""

from __future__ import annotations

import inspect

import pytest

import validators
from tests.validators.exchanges import check_of, exchange_of
from validators import Outcome, Validator


def test_exports_are_sorted_and_there() -> None:
    names = validators.__all__
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if name[0].isupper() and name not in constants]
    functions = [name for name in names if name[0].islower()]

    assert list(names) == sorted(constants) + sorted(classes) + sorted(functions)
    assert all(hasattr(validators, name) for name in names)


def test_everything_exported_says_what_it_is() -> None:
    for name in validators.__all__:
        value = getattr(validators, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


CHECKS = [
    check_of("finish_reason"),
    check_of("forbid", patterns="x"),
    check_of("json_schema", schema={}),
    check_of("length", max_chars=5),
    check_of("pii"),
    check_of("redact", patterns=["x", {"name": "y", "pattern": "y"}]),
    check_of("require", patterns="x"),
    check_of("secrets"),
    check_of("tool_calls"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.use)
def test_response_without_choices_is_no_reason_to_break(check: Validator) -> None:
    assert check.run(exchange_of({"choices": []})).outcome is Outcome.PASS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.use)
def test_configuration_survives_a_round_trip(check: Validator) -> None:
    written = check.model_dump(by_alias=True)

    again = type(check).model_validate(written)

    assert again.model_dump(by_alias=True) == written


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.use)
def test_configuration_has_a_json_schema(check: Validator) -> None:
    assert check.model_json_schema()["properties"]["use"]
