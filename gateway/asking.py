"""Asking the provider: what is sent, and what comes back read, or found unreadable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import orjson
from msgspec.structs import replace

from gateway import edits, wire
from gateway.calls import Call, Headers
from gateway.errors import UpstreamError
from gateway.ports import Attempt, Clock, Models, UpstreamCall, UpstreamResponse
from gateway.streaming import Collected, collect
from policies import Action, Decision, Evidence, Policy, StreamMode
from validators import Outcome


class Question(msgspec.Struct, frozen=True):
    """The body that goes to the provider; `injected` if it asks for logprobs that the client did not ask for."""

    body: bytes
    injected: bool


@dataclass(slots=True)
class Answer:
    """What the provider answered.

    `body` is what it said as one non-streamed body, exactly the provider's bytes if it was not a stream; `collected` is
    the stream it came as, if it did; `live` is set instead of both while a stream is still to be let through. `fault` says
    why the answer cannot be used: `unreadable`, `truncated`, `error`.
    """

    status: int
    headers: Headers
    question: Question
    body: bytes = b""
    reading: wire.Reading | None = None
    collected: Collected | None = None
    live: UpstreamResponse | None = None
    fault: str | None = None
    message: str = ""
    upstream_ms: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        """Whether there is a response to check."""
        failed = self.reading is not None and self.reading.is_failure
        return self.fault is None and 200 <= self.status < 300 and not failed

    def client_body(self) -> bytes:
        """The non-streamed body as the client is to see it: without logprobs it did not ask for."""
        if self.question.injected and self.reading is not None:
            return wire.without_logprobs(self.body, self.reading)
        return self.body

    def delivered_body(self, decision: Decision) -> bytes:
        """The client's body with what the decision redacts masked."""
        if not decision.redactions or self.reading is None or decision.action is Action.BLOCK:
            return self.client_body()
        texts = edits.redacted_texts(self.reading, decision.redactions)
        return edits.with_texts(self.body, texts, self.reading)


class Asker:
    """Asks providers on behalf of calls."""

    def __init__(self, models: Models, clock: Clock, *, response_bytes: int) -> None:
        self._models = models
        self._clock = clock
        self._response_bytes = response_bytes

    def question(self, call: Call, policy: Policy) -> Question:
        """The client's own bytes, asking for logprobs too if the policy needs them and the model is not known to refuse."""
        wanted = policy.confidence.source == "logprob"
        top = self._models.top_logprobs(call.facts.model) if wanted else None
        if top is None or wire.wants_logprobs(call.endpoint, call.request):
            return Question(call.body, injected=False)
        return Question(
            wire.with_logprobs(call.endpoint, call.body, call.request, top), injected=True
        )

    async def ask(self, call: Call, question: Question, mode: StreamMode) -> Answer:
        """Ask, and read what comes; a provider that refuses logprobs is asked again without.

        Raises
        ------
        UpstreamError, NotFound
            If there is no answer at all.
        """
        began_s = self._clock.monotonic_s()
        answer = await self._send(call, question, mode)
        refused = question.injected and self._models.refuses_logprobs(
            call.facts.model, answer.status, answer.body
        )
        if refused:
            attempts = answer.attempts
            answer = await self._send(call, Question(call.body, injected=False), mode)
            answer.attempts[:0] = attempts
        answer.upstream_ms = 1000 * (self._clock.monotonic_s() - began_s)
        return answer

    async def _send(self, call: Call, question: Question, mode: StreamMode) -> Answer:
        upstream_call = UpstreamCall(
            "POST",
            wire.PATH_OF[call.endpoint],
            body=question.body,
            headers=call.headers,
            query=call.query,
            model=call.facts.model or None,
            readable=True,
        )
        response = await self._models.send(upstream_call)
        answer = Answer(
            response.status, response.headers, question, attempts=upstream_call.attempts
        )
        is_stream = (response.header("content-type") or "").lower().startswith("text/event-stream")
        if not 200 <= response.status < 300:
            answer.body = await response.read(self._response_bytes)
        elif is_stream and call.streamed and mode is not StreamMode.BUFFER:
            answer.live = response
        elif is_stream:
            answer.collected = await collect(
                response, call.endpoint, self._response_bytes, strip=question.injected
            )
            read_collected(answer, answer.collected)
        else:
            answer.body = await self._whole(response, answer)
            _read(answer, call.endpoint)
        return answer

    async def _whole(self, response: UpstreamResponse, answer: Answer) -> bytes:
        try:
            return await response.read(self._response_bytes)
        except UpstreamError as error:
            if error.code == "upstream_response_too_large":
                raise
            answer.fault, answer.message = "truncated", error.message
            return b""


def read_collected(answer: Answer, collected: Collected) -> None:
    """Fill in what a collected stream says."""
    answer.body = collected.assembler.body()
    answer.fault, answer.message = collected.fault, collected.message
    _read(answer, collected.assembler.endpoint)


def _read(answer: Answer, endpoint: str) -> None:
    try:
        answer.reading = wire.read_response(endpoint, answer.body)
    except wire.Unreadable as error:
        # What went wrong earlier is the cause.
        if answer.fault is None:
            answer.fault, answer.message = "unreadable", str(error)


def with_feedback(call: Call, question: Question, answer: Answer, evidence: Evidence) -> Question:
    """The question asked again, with the answer that failed and what was wrong with it."""
    request = orjson.loads(question.body)
    said = _said(answer)
    turns = [
        {"role": "assistant", "content": said},
        {
            "role": "user",
            "content": f"That answer was not accepted:\n{_complaints(evidence)}\nAnswer again.",
        },
    ]
    name = "input" if call.endpoint == wire.RESPONSES else "messages"
    before = request.get(name)
    history = before if isinstance(before, list) else []
    if isinstance(before, str):
        history = [{"role": "user", "content": before}]
    request[name] = [*history, *turns]
    return replace(question, body=orjson.dumps(request))


def _said(answer: Answer) -> str:
    assert answer.reading is not None
    passages = (p.text for choice in answer.reading.choices[:1] for p in wire.passages_of(choice))
    return "\n".join(passages)


def _complaints(evidence: Evidence) -> str:
    findings: Iterable[str] = (
        f"- {finding.path}: {finding.message}"
        for result in evidence.results.values()
        if result.outcome is Outcome.FAIL
        for finding in result.findings
    )
    return "\n".join(findings)
