"""Whether the request bears out what the answer claims, sentence by sentence.

The answer is cut into sentences here and not by a model, so that no claim can be left out by what the answer says, and every
finding points at its sentence. Sentences as units, and a label for those that claim nothing, follow Jacovi et al. (2025), "The
FACTS Grounding Leaderboard", section 3; one unsupported sentence makes an answer ungrounded, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Self

from pydantic import PrivateAttr, ValidationInfo, model_validator

from judges.asking import Asking, Inquiry, together
from judges.base import Dialogue, VerdictError
from judges.context import answer_parts, request_parts
from judges.fence import as_data
from judges.rubric import Rubric, read_rubric
from judges.verdict import NONCE, WHY, Question
from validators import JSON, MAX_FINDINGS, Choice, Exchange, Finding, Opinion

#: Claims asked about in one call; the calls go side by side.
_BATCH = 40
_MAX_CLAIMS = 200

#: The end of a sentence: its marks, quotes and brackets behind them, white space; or the end of a line. A run of marks is
#: entered at its first only, which keeps the search linear.
_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++|(?<![。！？])[。！？]++[”’」』）]*+|\n\s*+"
)
#: `Dr.`, `e.g.` and `12.` end no sentence; what is as short goes with the sentence behind it.
_MAX_ABBREVIATION_CHARS = 4
_SAYS = re.compile(r"\w")

#: Tells a sentence that claims nothing (a greeting, a question back) from a claim.
_NOTHING = "skip"


class Claim(NamedTuple):
    """A sentence of the answer, or a tool call: where it stands (span None for the whole passage) and what it says."""

    path: str
    span: tuple[int, int] | None
    text: str


def claims(choice: Choice) -> Iterator[Claim]:
    """Every sentence that says something, then every tool call; spans are those of the passage at `path`."""
    for passage in (*choice.texts, *choice.refusals):
        start = 0
        for end in [*(match.end() for match in _END.finditer(passage.text)), len(passage.text)]:
            sentence = passage.text[start:end].rstrip()
            if len(sentence) <= _MAX_ABBREVIATION_CHARS and end < len(passage.text):
                continue
            if _SAYS.search(sentence):
                yield Claim(passage.path, (start, start + len(sentence)), sentence)
            start = end
    for call in choice.tool_calls:
        yield Claim(call.arguments.path, None, f"{call.name}({call.arguments.text})")


class Grounded(Asking):
    """Asks of every sentence and tool call whether what the request holds supports it; scores the least supported.

    `rubric` has one criterion, a yes or no question about a claim; its `context` says what counts as evidence.
    """

    use: Literal["grounded"]
    rubric: dict[str, object] | str

    _rubric: Rubric = PrivateAttr()
    _question: Question = PrivateAttr()

    @model_validator(mode="after")
    def _load(self, info: ValidationInfo) -> Self:
        self._rubric = read_rubric(self.rubric, info)
        if len(self._rubric.criteria) != 1 or self._rubric.criteria[0].kind != "yes_no":
            raise ValueError(
                f"the rubric {self._rubric.name!r} does not have exactly one yes_no criterion to ask of each claim; "
                "write one, or use: rubric"
            )
        (question,) = self._rubric.questions
        self._question = Question(question.id, question.text, {**question.worth, _NOTHING: 1.0})
        self._digest = self.digest_with(
            self._prompt(), self._rubric.model_dump(mode="json", exclude={"examples"})
        )
        return self

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask about the claims of every answer side by side; the score is that of the least supported claim."""
        if refused := self.refused(exchange):
            return refused
        context = request_parts(exchange, self._rubric.context)
        if not context:
            raise VerdictError(
                f"the request holds none of {', '.join(self._rubric.context)} to check the answer against"
            )
        found = [claim for choice in exchange.choices for claim in claims(choice)]
        if not found:
            raise VerdictError("the answer claims nothing")
        if len(found) > _MAX_CLAIMS:
            raise VerdictError(f"the answer makes more than {_MAX_CLAIMS} claims")
        inquiries = [
            self._inquiry(exchange, context, batch, nonce)
            for batch in (found[at : at + _BATCH] for at in range(0, len(found), _BATCH))
        ]
        verdicts, cost_usd = yield from together(inquiries)
        scores = [score for verdict in verdicts for score in verdict.scores.values()]
        findings = [
            Finding(
                claim.path, f"not supported (score {score:.2f})", claim.span, rule="unsupported"
            )
            for claim, score in zip(found, scores, strict=True)
            if score < self.pass_at
        ]
        parts = {f"c{number}": score for number, score in enumerate(scores, start=1)}
        why = verdicts[scores.index(min(scores)) // _BATCH].why
        opinion = Opinion(self.method, self.models, parts, rationale=why)
        return self.result(min(scores), findings[:MAX_FINDINGS], opinion, cost_usd)

    def _inquiry(
        self, exchange: Exchange, context: dict[str, JSON], batch: Sequence[Claim], nonce: str
    ) -> Inquiry:
        names = [f"c{number}" for number in range(1, len(batch) + 1)]
        document: dict[str, JSON] = {
            "request": context,
            "answers": [answer_parts(choice) for choice in exchange.choices],
            "claims": {name: claim.text for name, claim in zip(names, batch, strict=True)},
        }
        questions = [Question(name, self._question.text, self._question.worth) for name in names]
        return self.inquiry(self._prompt(), questions, document, nonce)

    def _prompt(self) -> str:
        lines = [
            self._rubric.description.strip(),
            "The answer is cut into claims for you. Read each as it is meant in the whole answer. "
            f'Label "{_NOTHING}" what claims nothing about the world: a greeting, a question, an offer, a heading.',
        ]
        for example in self._rubric.examples:
            reply: dict[str, JSON] = {
                NONCE: "MARK",
                "c1": example.labels[self._question.id],
                WHY: example.why.strip(),
            }
            shown: dict[str, JSON] = {
                "request": {part.value: text for part, text in example.request.items()},
                "claims": {"c1": example.answer},
            }
            lines.append(f"Example:\n{as_data(shown)}\n{as_data(reply)}")
        return self.prompt("\n\n".join(lines), [self._question], each="for each claim")
