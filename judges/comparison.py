"""Whether the answer says the same as a reference answer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from judges.asking import Asking, together
from judges.base import Dialogue, VerdictError
from judges.context import ContextPart, answer_parts, request_parts
from judges.verdict import Question
from validators import JSON, Exchange, Finding, Opinion

_PLACE = "context."
_TASK = """\
The document holds a request, a reference answer that is right, and an answer. Wording, order, length and form do not matter. \
What the answer adds does not matter as long as the reference does not contradict it."""
_SAME = Question(
    "agrees",
    "Does the answer agree with the reference in everything the request asks for, leaving none of it out?",
    {"yes": 1.0, "no": 0.0},
)


class Comparison(Asking):
    """Asks whether each answer agrees with a reference answer.

    `reference` is `context.` and a key of the request's metadata, or else the reference answer itself.
    """

    use: Literal["comparison"]
    reference: Annotated[str, Field(min_length=1, max_length=20_000)]

    @model_validator(mode="after")
    def _load(self) -> Self:
        self._digest = self.digest_with(self._prompt())
        return self

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask about every answer side by side; the score is that of the worst."""
        if refused := self.refused(exchange):
            return refused
        reference = self._found(exchange)
        request = request_parts(exchange, [ContextPart.SYSTEM, ContextPart.QUESTION])
        inquiries = []
        for choice in exchange.choices:
            document: dict[str, JSON] = {
                "request": request,
                "reference": reference,
                "answer": answer_parts(choice),
            }
            inquiries.append(self.inquiry(self._prompt(), [_SAME], document, nonce))
        verdicts, cost_usd = yield from together(inquiries)
        scores = [verdict.scores[_SAME.id] for verdict in verdicts]
        findings = [
            Finding(
                choice.path, f"disagrees with the reference (score {score:.2f})", rule="disagrees"
            )
            for choice, score in zip(exchange.choices, scores, strict=True)
            if score < self.pass_at
        ]
        worst = verdicts[scores.index(min(scores))]
        opinion = Opinion(self.method, self.models, worst.scores, rationale=worst.why)
        return self.result(min(scores), findings, opinion, cost_usd)

    def _found(self, exchange: Exchange) -> str:
        if not self.reference.startswith(_PLACE):
            return self.reference
        key = self.reference.removeprefix(_PLACE)
        if not (reference := exchange.context.get(key)):
            raise VerdictError(f"the request's metadata has no {key!r} to compare with")
        return reference

    def _prompt(self) -> str:
        return self.prompt(_TASK, [_SAME])
