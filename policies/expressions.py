"""CEL expressions: compiled once with every variable declared, evaluated with a budget.

The only module that knows the CEL library. A misspelt variable is an error at compile time; a
value missing at run time is `MissingValue`, never a silent true or false, and the caller says which
side that falls on.
Language: https://github.com/google/cel-spec, `doc/langdef.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import msgspec
from cel_expr_python import cel

from validators import JSON, CheckResult, Choice, Exchange, Malformed, Outcome, Passage, ToolCall

MAX_SOURCE_CHARS = 4096
#: One expression is evaluated for at most so many tool calls and choices of one response.
MAX_EVALUATIONS = 256

_TIERS = ("LOW", "MEDIUM", "HIGH", "CRITICAL")
_CHECK_TYPES = {
    "score": cel.Type.DOUBLE,
    "failed": cel.Type.BOOL,
    "error": cel.Type.BOOL,
    "findings": cel.Type.INT,
}
_VARIABLES = {
    "risk": cel.Type.INT,
    **dict.fromkeys(_TIERS, cel.Type.INT),
    "score": cel.Type.DOUBLE,
    "confidence": cel.Type.DOUBLE,
    "task": cel.Type.STRING,
    "model": cel.Type.STRING,
    "request": cel.Type.DYN,
    "context": cel.Type.Map(cel.Type.STRING, cel.Type.STRING),
    "output": cel.Type.DYN,
    "tool.name": cel.Type.STRING,
    "tool.arguments": cel.Type.DYN,
}
#: The variables every expression may use, besides `checks.<id>.score|failed|error|findings`.
VARIABLES = tuple(_VARIABLES)


class ExpressionError(ValueError):
    """An expression cannot be compiled; `line` and `column` count from 1 inside its own text."""

    def __init__(self, message: str, *, line: int = 1, column: int = 1, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message, self.line, self.column, self.hint = message, line, column, hint


class MissingValue(Exception):
    """An expression is neither true nor false of this exchange; says why, quoting nothing of it."""


class Variables(msgspec.Struct, frozen=True):
    """What expressions are evaluated against.

    `results` maps check id to result; None means the response is not known yet. `risk` is the
    tier's rank, 0 (low) to 3 (critical). `score` and `confidence` are in [0, 1], None if unknown.
    """

    exchange: Exchange
    risk: int = 0
    results: Mapping[str, CheckResult] | None = None
    score: float | None = None
    confidence: float | None = None


_BEFORE_RESPONSE = {"risk", *_TIERS, "task", "model", "request", "context"}

_Reader = Callable[[Variables], object]
_PLAIN: dict[str, _Reader] = {
    "risk": lambda v: v.risk,
    "score": lambda v: v.score,
    "confidence": lambda v: v.confidence,
    "task": lambda v: v.exchange.task or "",
    "model": lambda v: v.exchange.model,
    "request": lambda v: dict(v.exchange.request),
    "context": lambda v: dict(v.exchange.context),
    "LOW": lambda _: 0,
    "MEDIUM": lambda _: 1,
    "HIGH": lambda _: 2,
    "CRITICAL": lambda _: 3,
}


def _check_reader(name: str) -> _Reader:
    _, check, attribute = name.split(".")

    def read(variables: Variables) -> object:
        result = (variables.results or {}).get(check)
        if result is None:
            return None
        if attribute == "error":
            return result.outcome is Outcome.ERROR
        if result.outcome is Outcome.ERROR:
            return None
        match attribute:
            case "score":
                return result.score
            case "failed":
                return result.outcome is Outcome.FAIL
            case _:
                return len(result.findings)

    return read


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression of type bool.

    `names` are the declared variables it refers to; `needs_response` says whether one of them is
    known only once the response is there.
    """

    source: str
    names: frozenset[str]
    needs_response: bool
    _program: cel.Expression = field(repr=False, compare=False)
    _readers: tuple[tuple[str, _Reader], ...] = field(repr=False, compare=False)

    @property
    def checks(self) -> frozenset[str]:
        """The ids of the checks it refers to."""
        return frozenset(name.split(".")[1] for name in self.names if name.startswith("checks."))

    def holds(self, variables: Variables) -> bool:
        """Whether the expression is true.

        One that refers to `tool.*` is evaluated for each tool call, one that refers to `output` for
        each choice with text, and holds if it is true for any; without such a call or choice it
        does not hold. One that refers to what only the response can tell does not hold before the
        response is known.

        Raises
        ------
        MissingValue
            If it is true nowhere, and somewhere a value it needs is missing, has the wrong type, or
            takes more steps than the library allows.
        """
        if variables.results is None and self.needs_response:
            return False
        missing: str | None = None
        for count, bindings in enumerate(self._bindings(variables)):
            if count == MAX_EVALUATIONS:
                missing = missing or f"more than {MAX_EVALUATIONS} tool calls or choices to look at"
                break
            truth = self._evaluate(bindings)
            if truth is True:
                return True
            if truth is not False:
                missing = missing or truth
        if missing is not None:
            raise MissingValue(missing)
        return False

    def _bindings(self, variables: Variables) -> Iterator[dict[str, object]]:
        plain = {
            name: value for name, read in self._readers if (value := read(variables)) is not None
        }
        of_output = "output" in self.names
        of_tool = "tool.name" in self.names or "tool.arguments" in self.names
        if not (of_output or of_tool):
            yield plain
            return
        for choice in variables.exchange.choices:
            if of_output and not choice.text.strip():
                continue
            bindings = plain | _json("output", _answer(choice)) if of_output else plain
            if not of_tool:
                yield bindings
            for call in choice.tool_calls if of_tool else ():
                yield bindings | self._of_call(call)

    def _evaluate(self, bindings: dict[str, object]) -> bool | str:
        """True, false, or in words why it is neither."""
        try:
            truth = self._program.eval(data=bindings).value()
        except (RuntimeError, TypeError, ValueError) as error:
            truth = str(error)
        return truth if isinstance(truth, bool) else _reason(str(truth), self.source)

    def _of_call(self, call: ToolCall) -> dict[str, object]:
        bindings: dict[str, object] = {"tool.name": call.name}
        if "tool.arguments" in self.names:
            bindings |= _json("tool.arguments", call.arguments)
        return bindings


def _answer(choice: Choice) -> Passage:
    return choice.texts[0] if len(choice.texts) == 1 else Passage(choice.path, choice.text)


def _json(name: str, passage: Passage) -> dict[str, JSON]:
    try:
        return {name: passage.parsed()}
    except Malformed:
        return {}


def _reason(status: str, source: str) -> str:
    """The library's report in words; of keys only such as the expression itself spells out."""
    if found := re.search(r'No value with name "([\w.]+)"', status):
        return {
            "output": "the answer is not JSON",
            "tool.arguments": "the arguments of a tool call are not JSON",
        }.get(found[1], f"{found[1]} is not known")
    if found := re.search(r'Key not found in map : "(.*)"', status):
        return f"there is no key '{found[1]}'" if found[1] in source else "there is no such key"
    if found := re.search(r"No matching overloads found : _?(\S+?)_?\((.+)\)", status):
        return f"{found[1]} cannot be applied to {found[2]}"
    if "SELECT to non-message" in status:
        return "a value that should be an object is not one"
    if "iteration budget" in status.lower():
        return "the expression costs more than its budget"
    return "the expression cannot be evaluated on these values"


def compile_expression(source: str, check_ids: Sequence[str]) -> Expression:
    """An expression ready to be evaluated, its type checked against the declared variables.

    Raises
    ------
    ExpressionError
        If it is longer than MAX_SOURCE_CHARS, is not CEL, names a variable that does not exist, or
        is not of type bool.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise ExpressionError(f"longer than {MAX_SOURCE_CHARS} characters")
    declared = _VARIABLES | {
        f"checks.{check}.{attribute}": kind
        for check in check_ids
        for attribute, kind in _CHECK_TYPES.items()
    }
    try:
        program = cel.NewEnv(variables=declared).compile(source)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _explain(str(error), source, tuple(declared)) from error
    _refuse_has(source)
    if program.return_type() != cel.Type.BOOL:
        kind = program.return_type().name().lower()
        raise ExpressionError(f"has type {kind}, not bool", hint="compare it with something")
    names = _references(program.serialize()) & declared.keys()
    readers = tuple(
        (name, _PLAIN[name] if name in _PLAIN else _check_reader(name))
        for name in sorted(names)
        if name in _PLAIN or name.startswith("checks.")
    )
    return Expression(source, names, not names <= _BEFORE_RESPONSE, program, readers)


def _refuse_has(source: str) -> None:
    """Refuse `has()` of a whole variable: for dotted names the library takes it for the value."""
    for found in re.finditer(r"\bhas\(\s*((?:tool|checks\.\w+)\.\w+)\s*\)", source):
        before = source[: found.start(1)]
        raise ExpressionError(
            f"has() takes a field, and {found[1]} is a whole variable",
            line=before.count("\n") + 1,
            column=len(before) - before.rfind("\n"),
            hint="write for example has(tool.arguments.amount)",
        )


def _explain(report: str, source: str, declared: Sequence[str]) -> ExpressionError:
    found = re.search(r"ERROR: <input>:(\d+):(\d+): (.*)", report)
    if found is None:
        return ExpressionError("not a CEL expression")
    line, column = int(found[1]), int(found[2])
    message = found[3].removesuffix(" [INVALID_ARGUMENT]")
    if undeclared := re.search(r"undeclared reference to '([^']+)'", message):
        name = undeclared[1]
        written = source.split("\n")[line - 1]
        # The library points at the last dot of a dotted name.
        start = column - len(name.rpartition(".")[0])
        if start >= 1 and written.startswith(name, start - 1):
            column = start
        if re.compile(r"[.\w]*\s*\(").match(written, column - 1):
            return ExpressionError(f"unknown function '{name}'", line=line, column=column)
        return ExpressionError(
            f"unknown variable '{name}'", line=line, column=column, hint=_nearest(name, declared)
        )
    if overload := re.search(r"no matching overload for '([^']+)' applied to '\((.*)\)'", message):
        operator, kinds = overload[1].replace("_", " ").strip(), overload[2].split(", ")
        return ExpressionError(
            f"'{operator}' cannot be applied to {' and '.join(kinds)}",
            line=line,
            column=column,
            hint=_type_hint(set(kinds)) if operator in _COMPARISONS else "",
        )
    if "Syntax error" in message:
        near = re.search(r"(?:input|at:?) '(.*?)'", message)
        end = near is None or near[1] == "<EOF>"
        message = "ends too soon" if end else f"syntax error near {near[1]!r}" if near else message
    return ExpressionError(message, line=line, column=column)


def _nearest(name: str, declared: Sequence[str]) -> str:
    words = {word.lower(): word for word in reversed(declared)}
    near = get_close_matches(name.lower(), words, n=1)
    return f"did you mean '{words[near[0]]}'?" if near else f"known are {', '.join(VARIABLES)}"


_COMPARISONS = {"==", "!=", "<", "<=", ">", ">="}


def _type_hint(kinds: set[str]) -> str:
    if kinds == {"double", "int"}:
        return "write whole numbers with a decimal point, such as 1.0"
    if "string" in kinds and kinds & {"bool", "int", "double"}:
        return (
            "tiers are written LOW, MEDIUM, HIGH, CRITICAL without quotes, "
            "and every value of context is text, such as 'true'"
        )
    return ""


def _references(serialized: bytes) -> frozenset[str]:
    """The names an expression refers to, read from its serialised form.

    That is a protobuf `Any` holding a `cel.expr.CheckedExpr`: field 2 is `map<int64, Reference>
    reference_map`, and field 1 of a Reference the name (cel-spec, `proto/cel/expr/checked.proto`).
    """
    return frozenset(
        name.decode()
        for checked in _fields(serialized, 2)
        for entry in _fields(checked, 2)
        for reference in _fields(entry, 2)
        for name in _fields(reference, 1)
    )


_VARINT = 0


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited values of one field of a protobuf message without fixed-width fields."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        size, at = _varint(message, at)
        if tag & 7 == _VARINT:
            continue
        if tag >> 3 == wanted:
            yield message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
