"""A judge that says what a script tells it to, and all that it takes to hear it in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

import orjson
from pydantic import Field

from gateway.errors import GatewayError
from gateway.interviews import Interviewer, Terms
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry, Price
from gateway.spending import Account, Prices, Purse
from gateway.telemetry import Metrics
from judges import CallsFailed, Dialogue, Judge, ModelCall, ModelReply, VerdictError
from tests.fakes import FakeClock, Says
from tests.policies.build import exchange
from validators import CheckResult, Exchange, Outcome

EXCHANGE = exchange(None)
#: A token costs a dollar.
DOLLARS = Price(input_usd_per_million_tokens=1e6, output_usd_per_million_tokens=1e6)


class Toy(Judge):
    """Asks its models side by side, and passes if all of them say yes; `forgives` those that do not answer."""

    use: Literal["toy"] = "toy"
    asks: tuple[str, ...] = ("m-1",)
    rounds: int = 1
    forgives: bool = False
    breaks: bool = False
    pass_at: float = 0.5
    parameters: dict[str, Any] = Field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        return self.asks

    @property
    def digest(self) -> str:
        return "0" * 64

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        said: list[str] = []
        for number in range(self.rounds):
            content = f"{nonce} {number} {[choice.text for choice in exchange.choices]}"
            message = {"role": "user", "content": content}
            try:
                replies = yield tuple(
                    ModelCall(model, [message], self.parameters) for model in self.asks
                )
            except CallsFailed as error:
                if not self.forgives:
                    raise
                replies = tuple(each for each in error.outcomes if isinstance(each, ModelReply))
            said += [reply.text for reply in replies]
        if self.breaks:
            raise ZeroDivisionError(said[0])
        if not said or set(said) - {"yes", "no"}:
            raise VerdictError("neither yes nor no")
        score = said.count("yes") / len(said)
        return CheckResult(self.id, Outcome.PASS if score == 1 else Outcome.FAIL, score=score)


def says(text: str | None, **more: Any) -> Says:
    """A reply that costs three dollars."""
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return Says(orjson.dumps({"choices": [choice], "usage": usage, **more}))


class Models:
    """Providers, each of which gives its answers in turn, the last one again and again.

    `asked` is released by every question; `most` is how many were under way at once; `stopped` those that were cancelled.
    """

    def __init__(self, **answers: list[Says | GatewayError]) -> None:
        self._answers = {name.replace("_", "-"): list(each) for name, each in answers.items()}
        self.calls: list[UpstreamCall] = []
        self.asked = asyncio.Semaphore(0)
        self.most = self.stopped = self._under_way = 0
        self.top: int | None = 5

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """Give the model's next answer, once its gate is open."""
        self.calls.append(call)
        self.asked.release()
        answers = self._answers[str(call.model)]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            await asyncio.sleep(0)
            if isinstance(answer, GatewayError):
                raise answer
            if answer.gate is not None:
                await answer.gate.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            self._under_way -= 1

        async def chunks() -> Any:
            for part in answer.parts:
                yield part

        return UpstreamResponse(answer.status, list(answer.headers), chunks())

    def top_logprobs(self, model: str) -> int | None:
        """The number of alternatives, whatever the model."""
        return self.top

    def refuses_logprobs(self, model: str, status: int, body: bytes) -> bool:
        """True for a refusal that speaks of logprobs; from then on it gives none."""
        if status != 400 or b"logprobs" not in body:
            return False
        self.top = None
        return True

    def list_models(self) -> bytes | None:
        """None: the provider is to be asked."""
        return None

    def body(self, number: int = -1) -> Mapping[str, Any]:
        """What was sent with one of the calls."""
        body = self.calls[number].body
        assert isinstance(body, bytes)
        found: dict[str, Any] = orjson.loads(body)
        return found


class Court:
    """An interviewer before scripted providers, and an account with a limit."""

    def __init__(
        self, models: Models, *, limit_usd: float | None = None, concurrency: int = 32
    ) -> None:
        self.models = models
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.account = Account()
        self.limit_usd = limit_usd
        prices = Prices([ModelEntry(match="m-*", price=DOLLARS), ModelEntry(match="*")])
        self.interviewer = Interviewer(
            models, prices, self.clock, self.metrics, concurrency=concurrency
        )

    async def hear(
        self, judge: Judge, *, within_s: float = 5.0, is_fair: bool = True
    ) -> CheckResult:
        """What the judge says on the exchange."""
        deadline_s = asyncio.get_running_loop().time() + within_s
        terms = Terms(Purse(self.account, self.limit_usd), deadline_s, is_fair)
        return await self.interviewer.result(judge, EXCHANGE, terms)
