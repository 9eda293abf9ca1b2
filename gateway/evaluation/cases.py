"""What judges are measured on: exchanges, and whether people find the answer acceptable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
from msgspec.structs import replace
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from gateway import wire
from gateway.ports import Store
from gateway.records import LabelledDecision
from validators import JSON, Choice, Exchange, Passage

_AT_ONCE = 200
CORPUS = Path(__file__).with_name("attacks.jsonl")


class CaseError(ValueError):
    """A file of labels is wrong; the message says where and how to mend it."""


class Case(msgspec.Struct, frozen=True):
    """An exchange to be judged. `acceptable` is what people say, None if nobody did; `digest` is of the exchange."""

    id: str
    exchange: Exchange
    digest: str
    acceptable: bool | None = None
    group: str = ""

    @property
    def answer(self) -> str:
        """Everything the answer says, its tools' arguments included."""
        passages = (p for choice in self.exchange.choices for p in wire.passages_of(choice))
        return "\n".join(passage.text for passage in passages)


class _Line(BaseModel):
    """A line of a file of labels."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=200)]
    request: dict[str, JsonValue] | None = None
    messages: list[JsonValue] | None = None
    response: dict[str, JsonValue] | None = None
    answer: str | None = None
    acceptable: bool | None = None
    group: Annotated[str, Field(max_length=200)] = ""

    @model_validator(mode="after")
    def _is_whole(self) -> _Line:
        if (self.request is None) == (self.messages is None):
            raise ValueError("write either request or messages")
        if (self.response is None) == (self.answer is None):
            raise ValueError("write either response or answer")
        return self


def read_cases(path: Path) -> list[Case]:
    """The cases of a JSON Lines file, one object a line; blank lines are passed over.

    Each has an `id`, a `request` (the body) or its `messages`, a `response` (the body) or its text as `answer`, and may have
    `acceptable` and a `group` that it is counted with.

    Raises
    ------
    CaseError
        If the file cannot be read, is empty, a line is not such an object, or an id comes twice.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CaseError(f"{path}: cannot be read: {error.strerror}") from error
    cases: dict[str, Case] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = _case(_Line.model_validate_json(line))
        except ValidationError as error:
            raise CaseError(f"{path}:{number}: {_first(error)}") from error
        except wire.Unreadable as error:
            raise CaseError(f"{path}:{number}: {error}") from error
        if case.id in cases:
            raise CaseError(f"{path}:{number}: the id {case.id!r} came before; ids must differ")
        cases[case.id] = case
    if not cases:
        raise CaseError(f"{path}: there are no cases in it")
    return list(cases.values())


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {message}" if place else message


def _case(line: _Line) -> Case:
    request: dict[str, Any] = {"messages": line.messages} if line.request is None else line.request
    response: dict[str, Any] | None = line.response
    if response is None:
        message = {"role": "assistant", "content": line.answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        response = {"model": request.get("model") or "", "choices": [choice]}
    endpoint = _endpoint(request)
    return _made(line.id, endpoint, request, orjson.dumps(response), line.acceptable, line.group)


def _endpoint(request: Mapping[str, JSON]) -> str:
    if "messages" in request:
        return wire.CHAT
    if "input" in request:
        return wire.RESPONSES
    if "prompt" in request:
        return wire.COMPLETIONS
    raise wire.Unreadable("request: it has none of messages, input and prompt")


def _made(
    case_id: str,
    endpoint: str,
    request: dict[str, JSON],
    response: bytes,
    acceptable: bool | None,
    group: str,
) -> Case:
    reading = wire.read_response(endpoint, response)
    facts = wire.facts(endpoint, request, task=None, key=None)
    model = reading.model or facts.model
    exchange = Exchange(endpoint, request, reading.choices, model, facts.task, facts.context)
    digest = hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS) + response)
    return Case(case_id, exchange, digest.hexdigest(), acceptable, group)


class Attack(msgspec.Struct, frozen=True):
    """An answer that is wrong and tries to talk its judge round, and its honest twin: the same wrong answer without that."""

    category: str
    attack: Case
    honest: Case


class _Attempt(BaseModel):
    """A line of the corpus of attacks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    category: str
    language: str
    question: str
    honest: str
    attack: str


def attacks(path: Path = CORPUS) -> list[Attack]:
    """A corpus of attacks; by default the one that comes with Holdgate."""
    lines = [_Attempt.model_validate_json(line) for line in path.read_bytes().splitlines()]
    return [
        Attack(
            line.category,
            _asked(f"{line.id} attack", line.question, line.attack),
            _asked(f"{line.id} honest", line.question, line.honest),
        )
        for line in lines
    ]


def _asked(case_id: str, question: str, answer: str) -> Case:
    messages: list[JsonValue] = [{"role": "user", "content": question}]
    return _case(_Line(id=case_id, messages=messages, answer=answer))


def exchanged(case: Case, key: str) -> Case | None:
    """The case with its answer and the reference in its context under `key` in each other's place; None if there is none."""
    reference = case.exchange.context.get(key)
    if not reference:
        return None
    passage = Passage("choices[0].message.content", reference)
    context = {**case.exchange.context, key: case.answer}
    choices = (Choice("choices[0]", texts=(passage,)),)
    return replace(
        case,
        exchange=replace(case.exchange, context=context, choices=choices),
        digest=hashlib.sha256(f"exchanged {case.digest}".encode()).hexdigest(),
    )


async def reviewed_cases(store: Store) -> tuple[list[Case], int]:
    """What people decided in review, as cases grouped by policy; and how many decisions kept no content to judge."""
    cases: list[Case] = []
    empty, after = 0, ""
    while found := await store.labelled(after, _AT_ONCE):
        after = found[-1].decision.id
        for each in found:
            case = _reviewed(each)
            if case is None:
                empty += 1
            else:
                cases.append(case)
    return cases, empty


def _reviewed(labelled: LabelledDecision) -> Case | None:
    decision = labelled.decision
    if decision.request is None or decision.response is None:
        return None
    try:
        request = wire.parse_request(decision.request)
        return _made(
            decision.id,
            decision.endpoint,
            request,
            decision.response,
            labelled.acceptable,
            decision.policy,
        )
    except wire.Unreadable:
        # What a person saw was an error of the provider: there is no answer in it.
        return None
