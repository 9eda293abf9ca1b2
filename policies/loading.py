"""YAML text to policies. All problems are found at once, each with its place and its mend."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import orjson
from pydantic import ValidationError

from policies.expressions import ExpressionError, compile_expression
from policies.lint import lint, unreachable
from policies.match import PolicySet
from policies.mistakes import translate
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
        contents[path] = read(path)
        return contents[path]

    problems = source.problems + list(_expression_problems(source))
    try:
        policy = Policy.model_validate(
            source.data, context={"read": recorded}, by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise PolicyError(problems + list(translate(error, source, json_schema()))) from error
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


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a policy document, for editors; shared, not to be changed."""
    schema = Policy.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
