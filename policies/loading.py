"""YAML text to policies. All problems are found at once, each with its place and its mend."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from policies.expressions import ExpressionError, compile_expression
from policies.lint import lint, unreachable
from policies.match import PolicySet
from policies.model import Policy
from policies.source import Path, PolicyError, Problem, Source
from validators import JSON

#: Part of every digest; changes when the meaning of a document, its defaults included, changes.
FORMAT = "holdgate policy 1"

ReadFile = Callable[[str], str]


def load_policy(text: str, *, file: str, read: ReadFile) -> Policy:
    """The policy a YAML document describes, ready for use, the files it names read, digest set.

    Parameters
    ----------
    text : str
        The YAML document.
    file : str
        What it is called in error messages.
    read : function from path to text
        Gives the contents of a file the document names; raises OSError or ValueError if it cannot.

    Raises
    ------
    PolicyError
        With every problem found.
    """
    return _load(text, file, read)[0]


def load_policies(files: Sequence[tuple[str, str]], *, read: ReadFile) -> PolicySet:
    """The policies of several files (name, text), in that order, with the warnings of lint.

    Raises
    ------
    PolicyError
        With every problem of every file; two policies of one name are a problem.
    """
    loaded: list[tuple[Policy, Source]] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for file, text in files:
        try:
            policy, source, remarks = _load(text, file, read)
        except PolicyError as error:
            problems += error.problems
            continue
        loaded.append((policy, source))
        warnings += remarks
    problems += _name_clashes(loaded)
    if problems:
        raise PolicyError(problems)
    warnings += [
        loaded[index][1].problem(("match",), message, key=True)
        for index, message in unreachable([policy for policy, _ in loaded])
    ]
    return PolicySet([policy for policy, _ in loaded], sorted(warnings))


def _name_clashes(loaded: Sequence[tuple[Policy, Source]]) -> Iterator[Problem]:
    first: dict[str, Problem] = {}
    for policy, source in loaded:
        place = source.problem(("policy",), "")
        if (other := first.setdefault(policy.policy, place)) is not place:
            message = (
                f"the policy name '{policy.policy}' is already taken at "
                f"{other.file}:{other.line}:{other.column}"
            )
            yield source.problem(("policy",), message)


def _load(text: str, file: str, read: ReadFile) -> tuple[Policy, Source, list[Problem]]:
    source = Source(text, file)
    contents: dict[str, str] = {}

    def recorded(path: str) -> str:
        try:
            contents[path] = read(path)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        return contents[path]

    problems = source.problems + list(_expression_problems(source))
    try:
        policy = Policy.model_validate(
            source.data, context={"read": recorded}, by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise PolicyError(problems + list(_translate(error, source))) from error
    remarks = [(remark, source.problem(remark.path, remark.message)) for remark in lint(policy)]
    problems += [place for remark, place in remarks if remark.refuses]
    if problems:
        raise PolicyError(problems)
    policy._digest = _digest(policy, contents)
    return policy, source, [place for remark, place in remarks if not remark.refuses]


def _digest(policy: Policy, contents: Mapping[str, str]) -> str:
    document = policy.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    whole = [FORMAT, document, contents]
    return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _expression_problems(source: Source) -> Iterator[Problem]:
    """The problems of every expression, from the plain data so that no other mistake hides them."""
    ids = [
        text
        for stage in _items(source.data, "stages")
        for check in _items(stage, "checks")
        if isinstance(text := _get(check, "id"), str)
    ]
    places: list[tuple[Path, JSON]] = [
        (("risk", "raise", index, "when"), _get(rule, "when"))
        for index, rule in enumerate(_items(_get(source.data, "risk"), "raise"))
    ]
    places += [
        (("stages", index, "when"), _get(stage, "when"))
        for index, stage in enumerate(_items(source.data, "stages"))
    ]
    for path, when in places:
        if not isinstance(when, str):
            continue
        try:
            compile_expression(when, ids)
        except ExpressionError as error:
            yield source.problem_inside(path, error.line, error.column, str(error))


def _get(data: JSON, key: str) -> JSON:
    return data.get(key) if isinstance(data, dict) else None


def _items(data: JSON, key: str) -> list[JSON]:
    items = _get(data, key)
    return items if isinstance(items, list) else []


def _translate(error: ValidationError, source: Source) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        if _is_echo(detail):
            continue
        path = _path(detail["loc"], source.data)
        message = _in_words(detail, path, source.data)
        if detail["type"] == "value_error" and isinstance(detail["input"], dict):
            # What a rule across several keys says is about one of those it names.
            path += tuple(key for key in detail["input"] if re.search(rf"\b{re.escape(key)}\b", message))[:1]
        yield source.problem(path, message, key=detail["type"] == "extra_forbidden")


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
            tag = _get(data, "use")
            path.append(part)
        elif isinstance(data, dict) and isinstance(part, str) and part in data:
            data = data[part]
            path.append(part)
    return tuple(path)


def _in_words(detail: ErrorDetails, path: Path, data: JSON) -> str:
    """A pydantic error as a sentence for somebody who has never heard of pydantic."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    value = detail["input"]
    message = f"{_shown(value)} is not valid here"
    match detail["type"]:
        case "extra_forbidden":
            key = str(path[-1])
            message = f"unknown key '{key}'" + _suggest(key, _keys_at(path[:-1], data))
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
        case kind if kind in _MUST:
            message = f"must be {_MUST[kind].format_map(context)}, not {_shown(value)}"
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


def _keys_at(path: Path, data: JSON) -> list[str]:
    """The keys a mapping of the document may have, read from the document's JSON Schema."""
    schema = _resolve(json_schema(), data)
    for part in path:
        if isinstance(data, dict) and isinstance(part, str):
            data = data.get(part)
            schema = schema.get("properties", {}).get(part, {})
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
            schema = schema.get("items", {})
        schema = _resolve(schema, data)
    return list(schema.get("properties", {}))


def _resolve(schema: dict[str, Any], data: JSON) -> dict[str, Any]:
    """The schema that speaks of the keys: references followed, the branch of a union chosen."""
    if reference := schema.get("$ref"):
        return _resolve(json_schema()["$defs"][reference.rpartition("/")[2]], data)
    if "discriminator" in schema:
        tag = _get(data, schema["discriminator"]["propertyName"])
        return _resolve({"$ref": schema["discriminator"]["mapping"].get(tag, "")}, data)
    for branch in schema.get("anyOf", ()):
        if (found := _resolve(branch, data)).keys() & {"properties", "items"}:
            return found
    return schema


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a policy document, for editors; shared, not to be changed."""
    schema = Policy.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
