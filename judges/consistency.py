"""Whether the model says the same when it is asked again.

Answers that the model draws at temperature 1 are compared with the candidate, each by a judge or by their normal form (Manakul et
al. 2023, "SelfCheckGPT", section 5). What a model makes up differs from draw to draw; what it is wrong about steadily does not,
so agreement is a signal and no proof.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn, Self

import orjson
from msgspec.structs import replace
from pydantic import Field, model_validator

from judges.asking import Asking, Model, together
from judges.base import Dialogue, ModelCall, VerdictError
from judges.context import ContextPart, plain_messages, request_parts
from judges.verdict import Question
from validators import JSON, CheckResult, Choice, Exchange, Finding, Opinion

_TASK = """\
The document holds a request and two answers to it. Wording, order, length and form do not matter."""
_SAME = Question(
    "same",
    "Do the two answers say the same in everything that matters for the request?",
    {"yes": 1.0, "no": 0.0},
)

#: What of a request shapes the answer and can be sent again.
_KEPT = (
    "frequency_penalty",
    "max_completion_tokens",
    "max_tokens",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "stop",
    "tool_choice",
    "tools",
    "top_p",
)

_FENCED = re.compile(r"```\w*\n(?P<inside>[^`]*)\n```")
_LEAD = re.compile(
    r"(?:the |final |correct )*(?:answer|choice|option|result)(?: is)? *[:=]? *", re.IGNORECASE
)
_CHOICE = re.compile(r"[(\[]?([A-Za-z])[)\].:]?")
_NUMBER = re.compile(
    r"[-+]?[$€£]? ?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?:[eE][-+]?\d{1,3})? ?(?:[%$€£])?\.?"
)
_MAX_SHORT_CHARS = 64


class Consistency(Asking):
    """Has the model answer the request again, `samples` times, and compares.

    `compare: judge` asks `model` whether two answers say the same and scores their mean; `compare: normal_form` scores the
    share of samples whose normal form is the answer's: of JSON its values, of a number its value, of a choice its letter.
    """

    use: Literal["consistency"]
    model: Model = ""
    samples: Annotated[int, Field(ge=1, le=10)] = 4
    compare: Literal["judge", "normal_form"] = "judge"

    @model_validator(mode="after")
    def _load(self) -> Self:
        asks = self.model_fields_set & {"model", "method", "votes", "parameters"}
        if self.compare == "judge" and not self.model:
            raise ValueError(
                "compare: judge needs a model that compares; name it, or write compare: normal_form"
            )
        if self.compare == "normal_form" and asks:
            raise ValueError(
                f"compare: normal_form asks no judge; leave out {', '.join(sorted(asks))}"
            )
        self._digest = self.digest_with(self._prompt())
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The model that compares, if one does; the model that answers again is the one that each request names."""
        return (self.model,) if self.model else ()

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask the request again, then compare; the score is that of the least repeated answer."""
        if refused := self.refused(exchange):
            return refused
        again = _again(exchange)
        for choice in exchange.choices:
            if choice.tool_calls or not choice.text.strip():
                raise VerdictError("only answers of text can be compared")
        forms = [self._form(choice) for choice in exchange.choices]
        replies = yield (again,) * self.samples
        texts = [reply.text for reply in replies]
        cost_usd = sum(reply.cost_usd for reply in replies)
        if self.compare == "normal_form":
            rows = [[float(normal_form(text) == form) for text in texts] for form in forms]
            return self._concluded(exchange, rows, Opinion("normal_form", (again.model,)), cost_usd)
        pairs = [
            self._pair(exchange, choice, text) for choice in exchange.choices for text in texts
        ]
        verdicts, more_usd = yield from together(
            [self.inquiry(self._prompt(), [_SAME], pair, nonce) for pair in pairs]
        )
        said = [verdict.scores[_SAME.id] for verdict in verdicts]
        rows = [said[at : at + self.samples] for at in range(0, len(said), self.samples)]
        why = verdicts[said.index(min(said))].why
        opinion = Opinion(self.method, (again.model, self.model), rationale=why)
        return self._concluded(exchange, rows, opinion, cost_usd + more_usd)

    def _concluded(
        self,
        exchange: Exchange,
        rows: Sequence[Sequence[float]],
        opinion: Opinion,
        cost_usd: float,
    ) -> CheckResult:
        """The result, from how far each sample agrees with each answer."""
        scores = [math.fsum(row) / len(row) for row in rows]
        findings = [
            Finding(
                choice.path, f"asked again, the model agrees to {score:.2f}", rule="inconsistent"
            )
            for choice, score in zip(exchange.choices, scores, strict=True)
            if score < self.pass_at
        ]
        row = rows[scores.index(min(scores))]
        parts = {f"sample_{number}": score for number, score in enumerate(row, start=1)}
        return self.result(min(scores), findings, replace(opinion, parts=parts), cost_usd)

    def _form(self, choice: Choice) -> str | None:
        form = normal_form(choice.text)
        if form is None and self.compare == "normal_form":
            raise VerdictError(
                "the answer is no JSON, number or choice and has no normal form; write compare: judge"
            )
        return form

    def _pair(self, exchange: Exchange, choice: Choice, sample: str) -> dict[str, JSON]:
        request = request_parts(exchange, [ContextPart.QUESTION])
        return {"request": request, "first": choice.text, "second": sample}

    def _prompt(self) -> str:
        return self.prompt(_TASK, [_SAME])


def normal_form(text: str) -> str | None:
    """What a short structured answer comes to, the same text for the same answer; None where there is no such form.

    JSON objects and arrays by their values (1.0 is 1, key order is no matter), alone or in a code fence; a number alone or
    behind "the answer is", with or without separators and a currency; a choice's letter.

    Examples
    --------
    >>> normal_form('{"b": 1.0, "a": 2}') == normal_form('{"a":2,"b":1}')
    True
    >>> normal_form("The answer is (B)."), normal_form("1,200.50 €"), normal_form("It depends.")
    ('b', '1200.5', None)
    """
    bare = text.strip()
    if fence := _FENCED.fullmatch(bare):
        bare = fence["inside"].strip()
    if bare[:1] in ("{", "["):
        return _canonical(bare)
    if len(bare) > _MAX_SHORT_CHARS:
        return None
    bare = bare.strip("*` ")
    if lead := _LEAD.match(bare):
        bare = bare[lead.end() :].strip("*` ")
    bare = bare.removesuffix(".")
    if _CHOICE.fullmatch(bare):
        return bare.strip("()[].:").casefold()
    if _NUMBER.fullmatch(bare):
        digits = "".join(each for each in bare if each in "0123456789.-eE")
        return _number(float(digits.removesuffix(".")))
    return None


def _canonical(text: str) -> str | None:
    try:
        value = json.loads(text, parse_int=float, parse_constant=_refuse)
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except (ValueError, RecursionError, TypeError):
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _number(value: float) -> str:
    return f"{value:.12g}"


def _again(exchange: Exchange) -> ModelCall:
    """The request as it was, at temperature 1."""
    model = exchange.request.get("model")
    messages: Sequence[dict[str, JSON]] | None = plain_messages(exchange)
    if messages is None or not isinstance(model, str):
        raise VerdictError("only a chat can be asked again; this request cannot be put as one")
    kept = {key: exchange.request[key] for key in _KEPT if key in exchange.request}
    if exchange.endpoint == "responses":
        kept = {}
    return ModelCall(model, messages, {**kept, "temperature": 1.0})
