"""What a judge is asked to say, how it is read, and the score that its words and their probabilities make.

The reply is one JSON object: the nonce, a label for each question in order, then a short reason. The label comes before the
reason because reasoning first collapses the spread of the label's probability (Wang et al. 2025, "Improving LLM-as-a-Judge
Inference with the Judgment Distribution").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NoReturn

import msgspec

from judges.base import ModelReply, ReplyToken, VerdictError
from validators import JSON
from validators.completion import TRUNCATED
from validators.location import value_spans

#: A reply longer than this is not read.
_MAX_REPLY_CHARS = 20_000
_MAX_WHY_CHARS = 1_000

#: Rounding may put a log-probability this much above 0; it then counts as 0.
_ROUNDING = 1e-3

_FENCE = re.compile(r"```(?:json)?\n(?P<inside>[^`]*)\n```")
#: What may stand in a token before and behind a label: the quotes and white space of JSON, a colon, a comma.
_BEFORE = " \t\r\n:\"'"
_BEHIND = " \t\r\n\"',}"

NONCE, WHY = "nonce", "why"


class Method(StrEnum):
    """How a judge's score comes about."""

    LOGPROB = "logprob"
    """The probabilities of the label's token (Liu et al. 2023, "G-Eval", section 2)."""
    VOTES = "votes"
    """The mean over several replies drawn at temperature 1, of which `logprob` is the expectation."""
    VERBALISED = "verbalised"
    """The probability the judge states; for judges that give no logprobs and are too dear to ask several times."""


class Question(msgspec.Struct, frozen=True):
    """A closed question: the labels that may answer it, and how good each is, in [0, 1]."""

    id: str
    text: str
    worth: Mapping[str, float]

    @property
    def is_binary(self) -> bool:
        """Whether it is answered yes or no, so that a probability of yes answers it too."""
        return "yes" in self.worth


class Verdict(msgspec.Struct, frozen=True):
    """A reply that was read: for each question its score in [0, 1], 1 best; the reason in the judge's words."""

    scores: Mapping[str, float]
    why: str


def reply_schema(questions: Sequence[Question], method: Method) -> JSON:
    """The JSON Schema of the reply, the same for every exchange, so that a provider compiles it once."""
    properties: dict[str, JSON] = {NONCE: {"type": "string"}}
    for question in questions:
        if method is Method.VERBALISED and question.is_binary:
            properties[question.id] = {"type": "number"}
        else:
            properties[question.id] = {"type": "string", "enum": list(question.worth)}
    properties[WHY] = {"type": "string"}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_verdict(
    replies: Sequence[ModelReply], questions: Sequence[Question], method: Method, nonce: str
) -> Verdict:
    """The verdict of one reply or, of several, their mean.

    Raises
    ------
    VerdictError
        If any reply is cut off, is not exactly one object with exactly the keys asked for, lacks the nonce, gives a
        label or number that is not allowed, or if `method` is `logprob` and its tokens' probabilities are not there.
    """
    read = [_read(reply, questions, method, nonce) for reply in replies]
    scores = {
        question.id: math.fsum(verdict.scores[question.id] for verdict in read) / len(read)
        for question in questions
    }
    return Verdict(scores, read[0].why)


def weigh(alternatives: Sequence[tuple[str, float]], worth: Mapping[str, float]) -> float:
    """The expected worth of a label: its variants' probabilities merged, and renormalised over the labels allowed.

    Parameters
    ----------
    alternatives : sequence of (token, natural-log probability)
        Any length; a token counts for the label of which it is the beginning, or which it begins with, whatever its case
        and the quotes and white space around it. Tokens that fit no label, or several, count for none.
    worth : mapping of label to a number in [0, 1]

    Returns
    -------
    float
        In [0, 1]; it grows with the probability of a label that is worth 1.

    Raises
    ------
    VerdictError
        If no token fits a label, or a log-probability is above 0 or NaN.

    Examples
    --------
    >>> from math import log
    >>> weigh([("yes", log(0.6)), (" Yes", log(0.2)), ("no", log(0.2))], {"yes": 1.0, "no": 0.0})
    0.8
    """
    mass = dict.fromkeys(worth, 0.0)
    for token, logprob in alternatives:
        if math.isnan(logprob) or logprob > _ROUNDING:
            raise VerdictError("a log-probability in the reply is no log-probability")
        label = _label(token, worth)
        if label is not None:
            mass[label] += math.exp(min(logprob, 0.0))
    total = math.fsum(mass.values())
    if not total > 0:
        raise VerdictError("none of the likely tokens where the label stands is a label")
    expected = math.fsum(mass[label] * good for label, good in worth.items()) / total
    return min(max(expected, 0.0), 1.0)


def _label(token: str, labels: Mapping[str, float]) -> str | None:
    said = token.lstrip(_BEFORE).casefold()
    bare = said.rstrip(_BEHIND)
    if not bare:
        return None
    if bare in labels:
        return bare
    begun = [label for label in labels if said == bare and label.startswith(said)]
    return begun[0] if len(begun) == 1 else None


def _read(reply: ModelReply, questions: Sequence[Question], method: Method, nonce: str) -> Verdict:
    document, start, text = _document(reply)
    expected = [NONCE, *(question.id for question in questions), WHY]
    if document.keys() != set(expected):
        raise VerdictError(f"the reply does not have exactly the keys {', '.join(expected)}")
    if document[NONCE] != nonce:
        raise VerdictError("the reply does not repeat the nonce")
    why = document[WHY]
    if not isinstance(why, str):
        raise VerdictError("the reply's reason is not text")
    spans = value_spans(text, [(question.id,) for question in questions])
    scores: dict[str, float] = {}
    for question in questions:
        value = document[question.id]
        if method is Method.VERBALISED and question.is_binary:
            scores[question.id] = _stated(question, value)
            continue
        label = _allowed(question, value)
        scores[question.id] = question.worth[label]
        if method is Method.LOGPROB:
            at = start + spans[question.id,][0] + isinstance(value, str)
            scores[question.id] = weigh(_alternatives(reply, at), question.worth)
    return Verdict(scores, why[:_MAX_WHY_CHARS])


def _document(reply: ModelReply) -> tuple[dict[str, JSON], int, str]:
    """The one object of a reply, where in the reply its text begins, and that text."""
    if reply.finish_reason in TRUNCATED:
        raise VerdictError(f"the reply is cut off ({reply.finish_reason})")
    if len(reply.text) > _MAX_REPLY_CHARS:
        raise VerdictError(f"the reply is over {_MAX_REPLY_CHARS} characters")
    start = len(reply.text) - len(reply.text.lstrip())
    text = reply.text.strip()
    if fence := _FENCE.fullmatch(text):
        start, text = start + fence.start("inside"), fence["inside"]
    try:
        document = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except VerdictError:
        raise
    except (ValueError, RecursionError) as error:
        raise VerdictError("the reply is not one JSON object and nothing else") from error
    if not isinstance(document, dict):
        raise VerdictError("the reply is not one JSON object and nothing else")
    return document, start, text


def _without_repeats(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise VerdictError("the reply gives a key twice")
    return document


def _refuse_constant(_: str) -> NoReturn:
    raise VerdictError("the reply holds a number that is none")


def _allowed(question: Question, value: JSON) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    label = value.casefold() if isinstance(value, str) else ""
    if label not in question.worth:
        allowed = ", ".join(question.worth)
        raise VerdictError(f"the label of {question.id} is none of {allowed}")
    return label


def _stated(question: Question, value: JSON) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise VerdictError(f"the probability of {question.id} is no number from 0 to 1")
    return value * question.worth["yes"] + (1 - value) * question.worth["no"]


def _alternatives(reply: ModelReply, at: int) -> list[tuple[str, float]]:
    """The tokens that may stand where the reply's character `at` stands, each with its log-probability."""
    if not reply.logprobs:
        raise VerdictError(
            "the reply has no logprobs; for a judge that gives none there are `method: votes` and `method: verbalised`"
        )
    position = 0
    for token in reply.logprobs:
        if not reply.text.startswith(token.token, position):
            break
        position += len(token.token)
        if position > at:
            return _chosen_and_others(token)
    raise VerdictError("the tokens of the logprobs do not spell the reply")


def _chosen_and_others(token: ReplyToken) -> list[tuple[str, float]]:
    if token.logprob is None:
        raise VerdictError("the label's token has no log-probability")
    others = [
        (other.token, other.logprob)
        for other in token.top_logprobs or ()
        if other.logprob is not None and other.token != token.token
    ]
    return [(token.token, token.logprob), *others]
