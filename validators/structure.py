"""Whether an answer, a block in it or the arguments of a tool call have the shape they must have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, Self

import orjson
from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from validators.base import (
    JSON,
    MAX_FINDINGS,
    CheckResult,
    Choice,
    Exchange,
    Finding,
    Malformed,
    Passage,
    Validator,
)
from validators.completion import TRUNCATED
from validators.location import pointer, value_spans
from validators.schema import Schema

_FENCE = re.compile(
    r"^[ ]{0,3}```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ ]{0,3}```|\Z)", re.MULTILINE | re.DOTALL
)
_OPENING = re.compile(r"[{\[]")

#: At most this many fenced blocks, or places where embedded JSON could begin, are tried.
_MAX_BLOCKS = 32
_MAX_REQUEST_SCHEMA_BYTES = 1 << 18


class _Unusable(Exception):
    """The request's own schema cannot be run; the message says why."""


class _Document(NamedTuple):
    """JSON to check: the passage it stands in (alone), where in the text of the response it begins, its schema."""

    passage: Passage
    offset: int | None
    schema: Schema


class JsonSchema(Validator):
    """Fails where JSON is missing, malformed or does not satisfy a schema.

    `target`: `answer` (the whole text is JSON), `json_block` (every fenced block of JSON, or else the largest JSON in the
    text) or `tool_arguments` (of every call, or of the calls of `tool`). `schema`: a mapping, the path of a JSON file,
    `response_format` (the schema the request itself asks the answer to have) or `request` (the schemas by which the request
    declares its tools). Where the request has no schema there is nothing to check.
    """

    use: Literal["json_schema"]
    target: Literal["answer", "json_block", "tool_arguments"] = "answer"
    tool: str | None = None
    schema_: Annotated[dict[str, object] | bool | str, Field(alias="schema")]

    _schema: Schema | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _compile(self, info: ValidationInfo) -> Self:
        on_tools = self.target == "tool_arguments"
        if self.tool is not None and not on_tools:
            raise ValueError(
                "tool is for target: tool_arguments; leave it out or change the target"
            )
        if self.schema_ == "request" and not on_tools:
            raise ValueError("schema: request is for tool_arguments; write schema: response_format")
        if self.schema_ == "response_format" and on_tools:
            raise ValueError("schema: response_format is for the answer; write schema: request")
        if self.schema_ not in ("request", "response_format"):
            document = (
                self.schema_ if not isinstance(self.schema_, str) else _read(self.schema_, info)
            )
            self._schema = Schema(document)
        return self

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with findings that name the place inside the JSON; ERROR if the request's own schema cannot be run."""
        findings: list[Finding] = []
        error = None
        for choice in exchange.choices:
            try:
                findings += self._of(exchange, choice)
            except _Unusable as unusable:
                error = str(unusable)
        # A problem found is certain, whatever else could not be looked at.
        return self.unable(error) if error and not findings else self.verdict(findings)

    def _of(self, exchange: Exchange, choice: Choice) -> list[Finding]:
        findings: list[Finding] = []
        for item in self._documents(exchange, choice):
            if isinstance(item, Finding):
                findings.append(item)
            else:
                findings += _problems(item, choice)
            if len(findings) >= MAX_FINDINGS:
                break
        return findings

    def _documents(self, exchange: Exchange, choice: Choice) -> Iterator[_Document | Finding]:
        if self.target == "tool_arguments":
            yield from self._arguments(exchange, choice)
            return
        schema = self._schema or _response_format(exchange)
        text = choice.text
        if schema is None or (not text and (choice.tool_calls or choice.refusals)):
            return
        whole = choice.texts[0] if len(choice.texts) == 1 else Passage(choice.path, text)
        offset = 0 if len(choice.texts) == 1 else None
        if self.target == "answer":
            yield _Document(whole, offset, schema)
            return
        blocks = fenced(text) or _embedded(text)
        if not blocks:
            rule = "truncated" if choice.finish_reason in TRUNCATED else "missing"
            yield Finding(whole.path, "there is no JSON in the text", rule=rule)
        for start, end in blocks:
            block = Passage(whole.path, text[start:end])
            yield _Document(block, None if offset is None else start, schema)

    def _arguments(self, exchange: Exchange, choice: Choice) -> Iterator[_Document | Finding]:
        calls = [call for call in choice.tool_calls if self.tool is None or call.name == self.tool]
        declared = _Declared(exchange.request) if self._schema is None and calls else None
        for call in calls:
            schema = self._schema
            if declared is not None:
                if declared.lacks(call.name):
                    message = f"tool {call.name[:64]!r} is not declared in the request"
                    yield Finding(call.arguments.path, message, rule="undeclared")
                    continue
                schema = declared.schema(call.name)
            if schema is not None:
                yield _Document(call.arguments, 0, schema)


class _Declared:
    """The tools a request declares, in the form of chat completions (also the old `functions`) and of responses."""

    def __init__(self, request: Mapping[str, JSON]) -> None:
        self._parameters: dict[str, JSON] = {}
        self._complete = True
        for tool in [*_items(request.get("tools")), *_items(request.get("functions"))]:
            nested = tool.get("function") or tool.get("custom")
            function = nested if isinstance(nested, dict) else tool
            name = function.get("name")
            if isinstance(name, str):
                self._parameters[name] = function.get("parameters")
            else:
                self._complete = False

    def lacks(self, name: str) -> bool:
        """Whether a tool is certainly not declared; hosted and remote tools bring names the request does not list."""
        return self._complete and name not in self._parameters

    def schema(self, name: str) -> Schema | None:
        """The compiled schema of a tool's arguments, None if it declares none."""
        return _of_request(self._parameters.get(name))


def _items(value: JSON) -> list[dict[str, JSON]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _read(path: str, info: ValidationInfo) -> dict[str, object] | bool:
    read = (info.context or {}).get("read")
    if read is None:
        raise ValueError(
            f"schema file {path!r} cannot be read here: no reader was given; write the schema inline"
        )
    try:
        document = orjson.loads(read(path))
    except OSError as error:
        raise ValueError(
            f"schema file {path!r} cannot be read: {error.strerror or error}"
        ) from error
    except orjson.JSONDecodeError as error:
        raise ValueError(f"schema file {path!r} is not JSON: {error}") from error
    if not isinstance(document, dict | bool):
        raise ValueError(f"schema file {path!r} holds no JSON object")
    return document


def _response_format(exchange: Exchange) -> Schema | None:
    """The schema the request asks the answer to have: chat `response_format`, responses `text.format`."""
    if exchange.endpoint == "responses":
        text = exchange.request.get("text")
        wanted = text.get("format") if isinstance(text, dict) else None
    else:
        wanted = exchange.request.get("response_format")
        wanted = wanted.get("json_schema") if isinstance(wanted, dict) else None
    return _of_request(wanted.get("schema")) if isinstance(wanted, dict) else None


def _of_request(schema: JSON) -> Schema | None:
    if schema is None:
        return None
    try:
        canonical = orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise _Unusable(f"the request's schema cannot be used: {error}") from error
    if len(canonical) > _MAX_REQUEST_SCHEMA_BYTES:
        raise _Unusable(f"the request's schema is over {_MAX_REQUEST_SCHEMA_BYTES} bytes")
    compiled = _compiled(canonical)
    if isinstance(compiled, str):
        raise _Unusable(f"the request's schema cannot be used: {compiled}")
    return compiled


@lru_cache(maxsize=64)
def _compiled(canonical: bytes) -> Schema | str:
    """The compiled schema, or why it cannot be used."""
    try:
        schema = Schema(orjson.loads(canonical))
    except ValueError as error:
        return str(error)
    return "it refers to more than its own definitions by #/..." if schema.foreign else schema


def _problems(document: _Document, choice: Choice) -> list[Finding]:
    passage, offset, schema = document
    try:
        value = passage.parsed()
    except Malformed as error:
        return [_malformed(passage, str(error), choice)]
    size_chars = len(passage.text)
    try:
        if schema.accepts(value, size_chars):
            return []
    except ValueError as error:
        raise _Unusable(str(error)) from error
    problems = schema.problems(value, size_chars)
    spans = (
        {} if offset is None else value_spans(passage.text, [problem.path for problem in problems])
    )
    findings = []
    for problem in problems:
        path = f"{passage.path}#{pointer(problem.path)}" if problem.path else passage.path
        span = spans.get(problem.path)
        if span is not None and offset is not None:
            span = span[0] + offset, span[1] + offset
        findings.append(Finding(path, problem.message, span, rule=problem.keyword))
    return findings


def _malformed(passage: Passage, reason: str, choice: Choice) -> Finding:
    if choice.finish_reason in TRUNCATED:
        message = f"is JSON cut off at the token limit (truncated): {reason}"
        return Finding(passage.path, message, rule="truncated")
    fenced = passage.text.lstrip().startswith("```")
    hint = "; it stands in a code fence, for which there is target: json_block" if fenced else ""
    return Finding(passage.path, f"is not JSON: {reason}{hint}", rule="malformed")


def fenced(text: str) -> list[tuple[int, int]]:
    """The spans of what stands in fenced blocks that are marked as JSON or begin like it, at most 32; it may be malformed."""
    fences = []
    for fence in _FENCE.finditer(text):
        label, body = fence[1].lower(), fence[2].lstrip()
        if label == "json" or (not label and body[:1] in ("{", "[")):
            fences.append(fence.span(2))
        if len(fences) == _MAX_BLOCKS:
            break
    return fences


def _embedded(text: str) -> list[tuple[int, int]]:
    largest = (0, 0)
    position = 0
    for _ in range(_MAX_BLOCKS):
        opening = _OPENING.search(text, position)
        if opening is None:
            break
        position = opening.start()
        try:
            _, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        if end - position > largest[1] - largest[0]:
            largest = position, end
        position = end
    return [largest] if largest[1] else []


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
