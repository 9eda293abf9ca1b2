"""Small policies, checks and exchanges for the tests of the core."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, ClassVar, Literal

from pydantic import InstanceOf

from judges import Dialogue, Judge, ModelCall
from policies.model import Budget, Policy, Stage
from validators import (
    Cause,
    Check,
    CheckResult,
    Choice,
    Exchange,
    Finding,
    OnError,
    OnFail,
    Outcome,
    TokenLogprob,
    TopLogprob,
    Validator,
)


class Says(Validator):
    """A check whose result is written down in its configuration."""

    can_redact: ClassVar[bool] = True

    use: Literal["says"] = "says"
    outcome: Outcome = Outcome.PASS
    score: float | None = None
    findings: tuple[InstanceOf[Finding], ...] = ()

    def run(self, exchange: Exchange) -> CheckResult:
        return CheckResult(self.id, self.outcome, score=self.score, findings=self.findings)


class Breaks(Validator):
    """A check that raises, quoting the response as careless code does."""

    use: Literal["breaks"] = "breaks"

    def run(self, exchange: Exchange) -> CheckResult:
        raise KeyError(exchange.choices[0].text)


class Opines(Judge):
    """A judge whose result is written down in its configuration."""

    use: Literal["opines"] = "opines"
    model: str = "judge-small"
    outcome: Outcome = Outcome.PASS
    score: float | None = None
    cause: Cause | None = None

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    @property
    def digest(self) -> str:
        return sha256(self.model.encode()).hexdigest()

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        yield (ModelCall(self.model, [{"role": "user", "content": nonce}]),)
        return self.said()

    def said(self) -> CheckResult:
        error = "it is tired" if self.outcome is Outcome.ERROR else None
        return CheckResult(self.id, self.outcome, score=self.score, error=error, cause=self.cause)


def opines(name: str, outcome: Outcome = Outcome.PASS, **rest: Any) -> Opines:
    return Opines(id=name, outcome=outcome, **rest)


def says(
    name: str,
    outcome: Outcome = Outcome.PASS,
    on_fail: OnFail = OnFail.HOLD,
    on_error: OnError | None = None,
    **rest: Any,
) -> Says:
    return Says(id=name, outcome=outcome, on_fail=on_fail, on_error=on_error, **rest)


def stage(
    *checks: Check,
    name: str = "rules",
    when: str | None = None,
    sample: float = 1.0,
    budget: Budget | None = None,
) -> Stage:
    return Stage.model_construct(name=name, when=when, sample=sample, budget=budget, checks=checks)


def policy(*stages: Stage, uncalibrated: str = "return", **rest: Any) -> Policy:
    confidence = {"when_uncalibrated": uncalibrated} | rest.pop("confidence", {})
    return Policy(policy="test", stages=stages, confidence=confidence, **rest)


def tokens(
    logprobs: Sequence[float | None], alternatives: Sequence[Sequence[float | None]] = ()
) -> list[TokenLogprob]:
    tops: list[list[TopLogprob] | None] = [
        [TopLogprob(each) for each in listed] for listed in alternatives
    ]
    return [
        TokenLogprob(logprob, "x", top)
        for logprob, top in zip(logprobs, tops or [None] * len(logprobs), strict=True)
    ]


def exchange(*choices: Sequence[TokenLogprob] | None, model: str = "demo-orders") -> Exchange:
    return Exchange(
        "chat",
        {},
        tuple(
            Choice(f"choices[{index}]", logprobs=logprobs) for index, logprobs in enumerate(choices)
        ),
        model=model,
    )
