"""Driving one judge: its questions go to the models, the replies back to it, until it gives its result.

A question goes straight to the provider, never through a policy. It is marked as ours, and a gateway that gets a marked call
refuses it, so that a judge whose model's address is a gateway, this one or another, cannot be judged in its turn.

References
----------
`Via`: RFC 9110, section 7.6.3. Chat completions: OpenAI API document, `CreateChatCompletionRequest`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import nan
from typing import Any

import msgspec
import orjson
from msgspec.structs import replace

from gateway.breaker import Breaker
from gateway.errors import GatewayError, UpstreamError, UpstreamTimeout
from gateway.ports import Clock, Models, UpstreamCall, UpstreamResponse
from gateway.spending import Prices, Purse, Usage, cost_usd, likely_usd
from gateway.telemetry import Metrics
from judges import CallsFailed, Dialogue, Judge, ModelCall, ModelReply, ReplyToken, VerdictError
from policies import vetted
from validators import JSON, Cause, CheckResult, Exchange, Outcome

_PSEUDONYM = "holdgate-judge"
_HEADERS = (("content-type", "application/json"), ("via", f"1.1 {_PSEUDONYM}"))
_REPLY_BYTES = 4_000_000

#: How long a parameter that a model refused is left out.
_REFUSED_S = 600.0
#: Statuses that say nothing about whether the model works: it did not like this one question.
_ABOUT_THE_QUESTION = (400, 413, 422)
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,60}")


def is_from_judge(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether a request (header names in lower case) is a judge's question, of this gateway or another."""
    return any(
        member.split()[1:2] == [_PSEUDONYM]
        for name, value in headers
        if name == "via"
        for member in value.split(",")
    )


class CallFailed(Exception):
    """A question that got no answer; the message says why in our words and quotes nothing of a reply."""

    def __init__(self, cause: Cause, message: str, model: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.model = model


class _Message(msgspec.Struct):
    content: str | None = None


class _Logprobs(msgspec.Struct):
    content: list[ReplyToken] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: Usage | None = None


class Terms(msgspec.Struct, frozen=True):
    """On what terms a judge is asked: each question is paid from `purse`; there is time until `deadline_s`.

    The deadline is on the event loop's clock. `is_fair` says that it gives a working model time enough, so that missing it
    counts against the model; a client's impatience does not.
    """

    purse: Purse
    deadline_s: float
    is_fair: bool = True


class Interview(msgspec.Struct, frozen=True):
    """A dialogue begun: `opening` is what the judge asks first, or its result if it asks nothing, or how it broke."""

    judge: Judge
    dialogue: Dialogue
    nonce: str
    opening: tuple[ModelCall, ...] | CheckResult | Exception

    @property
    def key(self) -> str | None:
        """What identifies the question: all that matters to the verdict, by construction; None if nothing is asked.

        That is the judge's digest and settings, and the very questions, but for the nonce.
        """
        if not isinstance(self.opening, tuple):
            return None
        settings = self.judge.model_dump_json(exclude={"id", "on_fail", "on_error"})
        asked = msgspec.json.encode(self.opening).replace(self.nonce.encode(), b"\0")
        parts = (self.judge.digest.encode(), settings.encode(), asked)
        return hashlib.sha256(b"\0\0".join(parts)).hexdigest()


def begin(judge: Judge, exchange: Exchange) -> Interview:
    """Let the judge say what it asks first."""
    nonce = secrets.token_hex(16)
    dialogue = judge.ask(exchange, nonce)
    opening: tuple[ModelCall, ...] | CheckResult | Exception
    try:
        opening = next(dialogue)
    except StopIteration as ended:
        opening = ended.value
    except Exception as error:  # noqa: BLE001 - it is evidence, and recorded when the interview goes on
        opening = error
    return Interview(judge, dialogue, nonce, opening)


@dataclass(slots=True)
class _Line:
    """What is known of one model: whether it works, how many calls it takes at once, what it refused and until when."""

    breaker: Breaker
    slots: asyncio.Semaphore
    refused: dict[str, float] = field(default_factory=dict)


class Interviewer:
    """Asks judges.

    Of one model at most `concurrency` questions are under way at once, further ones wait. A model that fails again and
    again is not asked for a while (`gateway.breaker`).
    """

    def __init__(
        self,
        models: Models,
        prices: Prices,
        clock: Clock,
        metrics: Metrics,
        *,
        concurrency: int,
    ) -> None:
        self._models = models
        self._prices = prices
        self._clock = clock
        self._metrics = metrics
        self._concurrency = concurrency
        self._lines: dict[str, _Line] = {}

    @property
    def down(self) -> list[str]:
        """The models whose breaker is open."""
        return sorted(model for model, line in self._lines.items() if line.breaker.is_open)

    async def result(self, judge: Judge, exchange: Exchange, terms: Terms) -> CheckResult:
        """What the judge says; see `answer`."""
        return await self.answer(begin(judge, exchange), terms)

    async def answer(self, interview: Interview, terms: Terms) -> CheckResult:
        """What the judge says in the end; whatever goes wrong is an ERROR with its cause.

        Latency and cost are filled in; a cost that is not known is NaN. If the caller is cancelled, the questions under way
        are, and their connections closed, before this returns.
        """
        judge = interview.judge
        began_s = self._clock.monotonic_s()
        failed_model: str | None = None
        try:
            with closing(interview.dialogue):
                result = vetted(await self._converse(interview, terms))
        except (CallsFailed, CallFailed) as error:
            failed = error.first if isinstance(error, CallsFailed) else error
            cause = failed.cause if isinstance(failed, CallFailed) else Cause.RAISED
            failed_model = failed.model if isinstance(failed, CallFailed) else None
            result = _unable(judge, cause, str(failed))
        except VerdictError as error:
            result = _unable(judge, Cause.VERDICT, str(error))
        except Exception as error:  # noqa: BLE001 - a judge that breaks is evidence like any other
            result = _unable(judge, Cause.RAISED, f"{type(error).__name__} in the judge")
        if result.outcome is Outcome.ERROR:
            result = replace(result, cause=result.cause or Cause.VERDICT)
            self._metrics.count_judge_failure(judge, result, failed_model)
        return replace(
            result,
            check=judge.id,
            latency_ms=1000 * (self._clock.monotonic_s() - began_s),
            cost_usd=terms.purse.cost_usd,
        )

    async def _converse(self, interview: Interview, terms: Terms) -> CheckResult:
        dialogue, calls = interview.dialogue, interview.opening
        if isinstance(calls, Exception):
            raise calls
        if isinstance(calls, CheckResult):
            return calls
        try:
            while True:
                outcomes = await self._outcomes(calls, terms)
                replies = tuple(each for each in outcomes if isinstance(each, ModelReply))
                if len(replies) < len(calls):
                    calls = dialogue.throw(CallsFailed(outcomes))
                else:
                    calls = dialogue.send(replies)
        except StopIteration as ended:
            result: CheckResult = ended.value
            return result

    async def _outcomes(
        self, calls: tuple[ModelCall, ...], terms: Terms
    ) -> list[ModelReply | Exception]:
        """The reply to each call, all asked at once, or what went wrong with it."""
        if len(calls) == 1:
            return [await self._outcome(calls[0], terms)]
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(self._outcome(call, terms)) for call in calls]
        return [each.result() for each in asking]

    async def _outcome(self, call: ModelCall, terms: Terms) -> ModelReply | Exception:
        try:
            async with asyncio.timeout_at(terms.deadline_s):
                return await self._ask(call, terms)
        except TimeoutError:
            message = f"{call.model} did not answer in time"
            return CallFailed(Cause.TIMEOUT, message, call.model)
        except CallFailed as error:
            return error

    async def _ask(self, call: ModelCall, terms: Terms) -> ModelReply:
        line = self._line(call.model)
        async with line.slots:
            if not line.breaker.admits():
                message = f"{call.model} has failed again and again, and is not asked for a while"
                raise CallFailed(Cause.UNAVAILABLE, message, call.model)
            try:
                reply = await self._exchange(call, line, terms)
            except _Unanswered as error:
                if error.is_about_the_question:
                    line.breaker.withdrawn()
                else:
                    line.breaker.failed()
                raise CallFailed(error.cause, str(error), call.model) from error
            except Exception:
                line.breaker.withdrawn()
                raise
            except asyncio.CancelledError:
                # Past its deadline the model was too slow; before it, somebody no longer wanted the answer.
                if terms.is_fair and asyncio.get_running_loop().time() >= terms.deadline_s:
                    line.breaker.failed()
                else:
                    line.breaker.withdrawn()
                raise
            line.breaker.succeeded()
            return reply

    def _line(self, model: str) -> _Line:
        if model not in self._lines:
            breaker = Breaker(self._clock.monotonic_s)
            self._lines[model] = _Line(breaker, asyncio.Semaphore(self._concurrency))
        return self._lines[model]

    async def _exchange(self, call: ModelCall, line: _Line, terms: Terms) -> ModelReply:
        """Ask, without the parameters that the model is known to refuse, and again without those it refuses now."""
        while True:
            parameters = self._acceptable(call, line)
            body = orjson.dumps({"model": call.model, "messages": call.messages, **parameters})
            reply = await self._paid(call, body, parameters, terms)
            if isinstance(reply, ModelReply):
                return reply
            refused = self._refused(call.model, parameters, reply)
            if not refused:
                raise _Unanswered.by_status(call.model, *reply)
            until_s = self._clock.monotonic_s() + _REFUSED_S
            line.refused.update(dict.fromkeys(refused, until_s))

    def _acceptable(self, call: ModelCall, line: _Line) -> dict[str, JSON]:
        now_s = self._clock.monotonic_s()
        left_out = {name for name, until_s in line.refused.items() if until_s > now_s}
        top = self._models.top_logprobs(call.model) if "logprobs" in call.parameters else None
        if top is None:
            left_out |= {"logprobs", "top_logprobs"}
        return {name: value for name, value in call.parameters.items() if name not in left_out}

    def _refused(
        self, model: str, parameters: Mapping[str, JSON], answer: tuple[int, bytes]
    ) -> set[str]:
        """Which of our parameters an error complains of: it names them in quotes, or as `param`."""
        status, body = answer
        if "logprobs" in parameters and self._models.refuses_logprobs(model, status, body):
            return {"logprobs", "top_logprobs"}
        if status not in (400, 422):
            return set()
        named = set(re.findall(rb"['\"`]([a-z_]+)['\"`]", body))
        return {name for name in parameters if name.encode() in named}

    async def _paid(
        self, call: ModelCall, body: bytes, parameters: Mapping[str, JSON], terms: Terms
    ) -> ModelReply | tuple[int, bytes]:
        """The reply, or the status and body of an error; paid for, also if it comes too late or is broken off."""
        price = self._prices.of(call.model)
        longest = parameters.get("max_completion_tokens", parameters.get("max_tokens"))
        likely = likely_usd(price, body, longest if isinstance(longest, int) else None)
        if not terms.purse.reserve(likely):
            message = "the stage has used up what it may spend in a day"
            raise CallFailed(Cause.BUDGET, message, call.model)
        # Broken off, a question costs nobody knows what: as much as was thought likely.
        spent_usd = likely
        began_s = self._clock.monotonic_s()
        try:
            status, answer = await self._sent(call, body, terms.deadline_s)
            if not 200 <= status < 300:
                spent_usd = 0.0
                return status, answer
            completion = _read(call.model, answer)
            if price and completion.usage:
                spent_usd = cost_usd(price, completion.usage)
        except _Unanswered as error:
            spent_usd = likely if error.cause is Cause.TIMEOUT else 0.0
            raise
        finally:
            terms.purse.pay(likely, spent_usd)
        choice = completion.choices[0]
        return ModelReply(
            text=choice.message.content or "",
            logprobs=choice.logprobs.content if choice.logprobs else None,
            finish_reason=choice.finish_reason,
            cost_usd=nan if spent_usd is None else spent_usd,
            latency_ms=1000 * (self._clock.monotonic_s() - began_s),
        )

    async def _sent(self, call: ModelCall, body: bytes, deadline_s: float) -> tuple[int, bytes]:
        upstream_call = UpstreamCall(
            "POST",
            "/chat/completions",
            body=body,
            headers=_HEADERS,
            model=call.model,
            readable=True,
            patience_s=max(deadline_s - asyncio.get_running_loop().time(), 0.0),
        )
        try:
            response: UpstreamResponse = await self._models.send(upstream_call)
            return response.status, await response.read(_REPLY_BYTES)
        except UpstreamTimeout as error:
            raise _Unanswered(Cause.TIMEOUT, error.message) from error
        except UpstreamError as error:
            raise _Unanswered(Cause.PROVIDER, error.message) from error
        except GatewayError as error:
            # Nobody serves the model, or its provider has no translation for the question.
            raise _Unanswered(Cause.PROVIDER, error.message, is_about_the_question=True) from error


class _Unanswered(Exception):
    """The provider gave no reply; whether that says something of the provider or of the question."""

    def __init__(self, cause: Cause, message: str, *, is_about_the_question: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.is_about_the_question = is_about_the_question

    @classmethod
    def by_status(cls, model: str, status: int, body: bytes) -> _Unanswered:
        """An error that the provider answered with."""
        code = error_code(body)
        message = f"the provider of {model} answered {status}{f' ({code})' if code else ''}"
        about = status in _ABOUT_THE_QUESTION
        return cls(Cause.PROVIDER, message, is_about_the_question=about)


def _read(model: str, answer: bytes) -> _Completion:
    try:
        completion = msgspec.json.decode(answer, type=_Completion)
    except msgspec.MsgspecError as error:
        message = f"what the provider of {model} sent is not a chat completion"
        raise _Unanswered(Cause.PROVIDER, message) from error
    if not completion.choices:
        raise _Unanswered(Cause.PROVIDER, f"the provider of {model} sent no choice")
    return completion


def error_code(body: bytes) -> str | None:
    """The provider's word for its error, in the body that it answered with, if it is a word."""
    try:
        said: Any = orjson.loads(body)["error"]
        code = said.get("code") or said.get("type")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None


def _unable(judge: Judge, cause: Cause, message: str) -> CheckResult:
    return CheckResult(judge.id, Outcome.ERROR, error=message, cause=cause)
