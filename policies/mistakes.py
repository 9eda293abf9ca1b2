"""Errors of validation in plain words, each at the key or value of the YAML it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from policies.source import Path, Problem, Source
from validators import JSON


def translate(
    error: ValidationError, source: Source, schema: Mapping[str, Any]
) -> Iterator[Problem]:
    """Every error of validating a document as a problem at the key or value it is about.

    `schema` is the JSON Schema of the document; the nearest of its keys is offered for an unknown
    one. Errors where the YAML itself could not be read are left out.
    """
    unread = {(problem.line, problem.column) for problem in source.problems}
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if not _is_echo(detail):
            by_path.setdefault(_path(detail["loc"], source.data), []).append(detail)
    for path, details in by_path.items():
        for message in _in_words(details, path, source.data, schema):
            is_key = details[0]["type"] == "extra_forbidden"
            problem = source.problem(_subject(path, details[0], message), message, key=is_key)
            if (problem.line, problem.column) not in unread:
                yield problem


def _subject(path: Path, detail: ErrorDetails, message: str) -> Path:
    """What a rule across the keys of a mapping is about: of those its message names, the first."""
    if detail["type"] == "union_tag_invalid":
        return (*path, "use")
    if detail["type"] != "value_error" or not isinstance(detail["input"], dict):
        return path
    named = (re.search(rf"\b{re.escape(key)}\b", message) for key in detail["input"])
    first = min((found.span() for found in named if found), default=None)
    return path if first is None else (*path, message[slice(*first)])


def _is_echo(detail: ErrorDetails) -> bool:
    """Whether an error only repeats others: of an expression, or of items that are bad."""
    if detail["type"] == "too_short":
        return len(detail["input"]) >= int(detail["ctx"]["min_length"])
    return detail["type"] == "value_error" and not detail["loc"]


def _path(loc: tuple[int | str, ...], data: JSON) -> Path:
    """Where in the document an error is: pydantic's location without the tags of its unions."""
    path: list[int | str] = []
    tag: JSON = None
    for part in loc:
        if tag is not None and part == tag:
            tag = None
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            tag = data.get("use") if isinstance(data, dict) else None
            path.append(part)
        elif isinstance(data, dict) and isinstance(part, str) and part in data:
            data = data[part]
            path.append(part)
    return tuple(path)


def _in_words(
    details: Sequence[ErrorDetails], path: Path, data: JSON, schema: Mapping[str, Any]
) -> list[str]:
    """Pydantic's errors about one place as sentences for people who have never heard of it."""
    wanted = [
        _MUST[detail["type"]].format_map(detail.get("ctx", {}))
        for detail in details
        if detail["type"] in _MUST
    ]
    others = [
        _sentence(detail, path, data, schema) for detail in details if detail["type"] not in _MUST
    ]
    if not wanted:
        return others
    return [f"must be {' or '.join(wanted)}, not {_shown(details[0]['input'])}", *others]


def _sentence(detail: ErrorDetails, path: Path, data: JSON, schema: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    value = detail["input"]
    message = f"{_shown(value)} is not valid here"
    match detail["type"]:
        case "extra_forbidden":
            key = str(path[-1])
            message = f"unknown key '{key}'" + _suggest(key, _keys_at(path[:-1], data, schema))
        case "missing":
            message = f"missing key '{detail['loc'][-1]}'"
        case "union_tag_not_found":
            message = "missing key 'use', which says what kind of check this is"
        case "union_tag_invalid":
            kinds = _quoted(context["expected_tags"])
            message = f"unknown check '{context['tag']}'" + _suggest(context["tag"], kinds)
        case "enum" | "literal_error":
            words = _quoted(context["expected"])
            message = (
                f"{_shown(value)} is not one of the words allowed{_suggest(str(value), words)}"
            )
        case "string_pattern_mismatch" if context["pattern"].startswith("^[a-z]"):
            message = f"{_shown(value)} is not a name: a letter, then up to 63 of a-z, 0-9, _"
        case "value_error" | "assertion_error":
            message = str(context["error"])
    return message


def _quoted(words: str) -> list[str]:
    return re.findall(r"'([^']*)'", words)


#: What a value must be, by pydantic's type of the error.
_MUST = {
    "string_type": "text (in quotes, if it looks like a number)",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    return str(value).lower() if isinstance(value, bool | int | float) else "this"


def _suggest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word.lower(), words, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(words)}" if words else ""


def _keys_at(path: Path, data: JSON, document: Mapping[str, Any]) -> list[str]:
    """The keys that a mapping of the data may have, by the JSON Schema of the document."""

    def resolve(schema: Mapping[str, Any], data: JSON) -> Mapping[str, Any]:
        """Follow references and choose the branch of a union that is for such data."""
        if reference := schema.get("$ref"):
            return resolve(document["$defs"][reference.rpartition("/")[2]], data)
        if union := schema.get("discriminator"):
            tag = data.get(union["propertyName"]) if isinstance(data, dict) else None
            return resolve({"$ref": union["mapping"].get(tag)}, data)
        for branch in schema.get("anyOf", ()):
            if ("items" if isinstance(data, list) else "properties") in (
                found := resolve(branch, data)
            ):
                return found
        return schema

    schema = resolve(document, data)
    for part in path:
        if isinstance(data, dict) and isinstance(part, str):
            data, schema = data.get(part), schema.get("properties", {}).get(part, {})
        elif isinstance(data, list) and isinstance(part, int):
            data, schema = data[part], schema.get("items", {})
        schema = resolve(schema, data)
    return list(schema.get("properties", {}))
