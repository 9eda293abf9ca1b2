"""A judge is a dialogue: next, send, and the result at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pytest

from judges import Dialogue, Judge, ModelCall, ModelReply, ReplyToken, VerdictError
from policies.cascade import vetted
from policies.evidence import Evidence
from tests.policies.build import exchange
from validators import CheckResult, Exchange, Outcome


class SecondOpinion(Judge):
    """Asks yes or no; asks once more if the answer is no."""

    use: Literal["second_opinion"] = "second_opinion"
    model: str = "judge-small"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    @property
    def digest(self) -> str:
        return "0" * 64

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        question = {"role": "user", "content": f"Is {exchange.choices[0].text!r} right?"}
        cost_usd, reply = 0.0, ModelReply("")
        for _ in range(2):
            (reply,) = yield (ModelCall(self.model, [question], {"logprobs": True}),)
            cost_usd += reply.cost_usd
            if reply.text == "yes":
                return CheckResult(self.id, Outcome.PASS, score=_weight(reply), cost_usd=cost_usd)
        if reply.text != "no":
            raise VerdictError("neither yes nor no")
        return CheckResult(self.id, Outcome.FAIL, score=0.0, cost_usd=cost_usd)


def _weight(reply: ModelReply) -> float:
    first = reply.logprobs[0].logprob if reply.logprobs else 0.0
    return math.nan if first is None else math.exp(first)


JUDGE = SecondOpinion(id="opinion")
EXCHANGE = exchange(None)
NONCE = "0123456789abcdef"


def finish(dialogue: Dialogue, reply: ModelReply) -> CheckResult:
    with pytest.raises(StopIteration) as ended:
        dialogue.send((reply,))
    result: CheckResult = ended.value.value
    return result


def drive(judge: Judge, replies: Mapping[str, ModelReply]) -> Mapping[str, CheckResult]:
    """What a stage's runner does with a judge: the same results by check id, the same vetting."""
    dialogue = judge.ask(EXCHANGE, NONCE)
    try:
        calls = next(dialogue)
        while True:
            calls = dialogue.send(tuple(replies[call.model] for call in calls))
    except StopIteration as ended:
        result = vetted(ended.value)
    except VerdictError as error:
        result = CheckResult(judge.id, Outcome.ERROR, error=str(error))
    return {judge.id: result}


def test_a_judge_asks_and_takes_the_reply() -> None:
    dialogue = JUDGE.ask(EXCHANGE, NONCE)
    (call,) = next(dialogue)
    assert call.model == "judge-small"
    assert call.parameters == {"logprobs": True}
    result = finish(dialogue, ModelReply("yes", [ReplyToken("yes", math.log(0.9))], cost_usd=0.01))
    assert (result.outcome, result.cost_usd) == (Outcome.PASS, 0.01)
    assert result.score == pytest.approx(0.9)


def test_a_judge_may_ask_again_and_adds_up_the_cost() -> None:
    dialogue = JUDGE.ask(EXCHANGE, NONCE)
    first = next(dialogue)
    assert dialogue.send((ModelReply("no", cost_usd=0.01),)) == first
    result = finish(dialogue, ModelReply("no", cost_usd=0.02))
    assert result.outcome is Outcome.FAIL
    assert result.cost_usd == pytest.approx(0.03)


def test_a_reply_without_a_verdict_is_never_a_pass() -> None:
    dialogue = JUDGE.ask(EXCHANGE, NONCE)
    next(dialogue)
    dialogue.send((ModelReply("perhaps"),))
    with pytest.raises(VerdictError):
        dialogue.send((ModelReply("perhaps"),))


def test_a_failed_call_reaches_the_judge() -> None:
    dialogue = JUDGE.ask(EXCHANGE, NONCE)
    next(dialogue)
    with pytest.raises(TimeoutError):
        dialogue.throw(TimeoutError())


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (ModelReply("yes"), Outcome.PASS),
        (ModelReply("no"), Outcome.FAIL),
        (ModelReply("perhaps"), Outcome.ERROR),
        (ModelReply("yes", [ReplyToken("yes", None)]), Outcome.ERROR),
    ],
    ids=["yes", "no", "unreadable", "nan score"],
)
def test_a_driven_judge_gives_evidence_like_a_validator(
    reply: ModelReply, outcome: Outcome
) -> None:
    evidence = Evidence().after("judge", drive(JUDGE, {"judge-small": reply}))
    assert evidence.ran == ("judge",)
    assert evidence.results["opinion"].outcome is outcome
