"""One judge's dialogue, driven: what is asked, what it costs, and what comes of everything that goes wrong."""

from __future__ import annotations

import asyncio
from math import isnan
from typing import Any

import pytest

from gateway.breaker import FAILURES, PAUSE_S
from gateway.errors import GatewayError, NotFound, UpstreamError, UpstreamTimeout
from gateway.interviews import begin, is_from_judge
from judges import Judge
from tests.fakes import Says
from tests.gateway.court import EXCHANGE, Court, Models, Toy, says
from tests.policies.build import exchange
from validators import Cause, Exchange, OnError, OnFail, Outcome

TOY = Toy(id="toy")
YES, NO = says("yes"), says("no")


def hanging() -> Says:
    """A provider that never answers."""
    return Says(b"", gate=asyncio.Event())


def refusal(message: str, status: int = 400) -> Says:
    return Says(b'{"error": {"message": "%s", "code": "no"}}' % message.encode(), status=status)


async def test_a_judge_is_asked_and_its_result_has_its_cost() -> None:
    court = Court(Models(m_1=[YES]))
    result = await court.hear(TOY)
    assert (result.check, result.outcome, result.score) == ("toy", Outcome.PASS, 1.0)
    assert (result.cost_usd, court.account.spent_usd) == (3.0, 3.0)
    (call,) = court.models.calls
    assert (call.method, call.path, call.model) == ("POST", "/chat/completions", "m-1")
    assert is_from_judge(call.headers)
    assert not any(name == "authorization" for name, _ in call.headers)
    assert call.patience_s == pytest.approx(5, abs=1)


async def test_every_dialogue_has_a_nonce_of_its_own() -> None:
    court = Court(Models(m_1=[YES]))
    for _ in range(2):
        await court.hear(TOY)
    nonces = {court.models.body(n)["messages"][0]["content"].split()[0] for n in range(2)}
    assert len(nonces) == 2
    assert all(len(nonce) == 32 and set(nonce) <= set("0123456789abcdef") for nonce in nonces)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (UpstreamError("It is gone."), Cause.PROVIDER),
        (UpstreamTimeout("It is late."), Cause.TIMEOUT),
        (NotFound("Nobody serves it."), Cause.PROVIDER),
        (refusal("down", 503), Cause.PROVIDER),
        (refusal("who are you", 401), Cause.PROVIDER),
        (Says(b"<html>"), Cause.PROVIDER),
        (Says(b'{"choices": []}'), Cause.PROVIDER),
        (Says(b'{"choices": [{"message": {"content": "ye'), Cause.PROVIDER),
        (Says(b'{"choices": [{"message": {"content": 7}}]}'), Cause.PROVIDER),
        (Says(b" " * 4_000_001), Cause.PROVIDER),
        (says(None), Cause.VERDICT),
        (says("perhaps"), Cause.VERDICT),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_goes_wrong_is_an_error_with_its_cause_and_counted(
    answer: Says | GatewayError, cause: Cause
) -> None:
    court = Court(Models(m_1=[answer]))
    result = await court.hear(TOY)
    assert (result.outcome, result.score, result.cause) == (Outcome.ERROR, None, cause)
    assert result.error
    counted = f'holdgate_judge_failures_total{{cause="{cause}",judge="toy",model="m-1"}} 1.0'
    assert counted in court.metrics.render().decode()


async def test_a_judge_that_breaks_is_an_error_that_quotes_nothing() -> None:
    court = Court(Models(m_1=[says("the secret")]))
    result = await court.hear(Toy(id="toy", breaks=True))
    assert (result.outcome, result.cause) == (Outcome.ERROR, Cause.RAISED)
    assert "secret" not in str(result.error)
    assert result.cost_usd == 3.0


async def test_an_error_quotes_nothing_of_the_providers_but_a_word() -> None:
    body = b'{"error": {"message": "secret", "code": "no such\\u0000thing"}}'
    court = Court(Models(m_1=[Says(body, status=500)]))
    assert (await court.hear(TOY)).error == "the provider of m-1 answered 500"


async def test_a_model_that_hangs_is_given_up_at_the_deadline_and_charged_as_likely() -> None:
    models = Models(m_1=[hanging()])
    court = Court(models)
    result = await court.hear(TOY, within_s=0.05)
    assert (result.cause, models.stopped) == (Cause.TIMEOUT, 1)
    assert result.cost_usd == court.account.spent_usd > 500
    assert court.account.reserved_usd == 0


async def test_a_provider_that_answers_with_an_error_is_not_paid() -> None:
    court = Court(Models(m_1=[refusal("down", 500)]))
    assert (await court.hear(TOY)).cost_usd == 0 == court.account.spent_usd


async def test_a_reply_without_usage_is_charged_as_likely_and_one_without_a_price_unknown() -> None:
    court = Court(Models(m_1=[says("yes", usage=None)], free=[YES]))
    assert (await court.hear(TOY)).cost_usd > 500
    assert isnan((await court.hear(Toy(id="toy", asks=("free",)))).cost_usd)


class TestSideBySide:
    async def test_the_calls_of_a_tuple_are_under_way_together(self) -> None:
        models = Models(m_1=[YES], m_2=[NO], m_3=[YES])
        court = Court(models)
        result = await court.hear(Toy(id="toy", asks=("m-1", "m-2", "m-3")))
        assert result.score == pytest.approx(2 / 3)
        assert (models.most, result.cost_usd) == (3, 9.0)

    async def test_a_judge_may_go_on_with_the_members_that_answered(self) -> None:
        models = Models(m_1=[YES], m_2=[UpstreamError("gone")], m_3=[hanging()])
        court = Court(models)
        toy = Toy(id="toy", asks=("m-1", "m-2", "m-3"), forgives=True)
        result = await court.hear(toy, within_s=0.05)
        assert (result.outcome, result.score) == (Outcome.PASS, 1.0)
        failed = await court.hear(toy.model_copy(update={"forgives": False}), within_s=0.05)
        assert failed.cause is Cause.PROVIDER

    async def test_a_judge_that_asks_on_past_its_deadline_gets_no_answer(self) -> None:
        models = Models(m_1=[hanging()])
        toy = Toy(id="toy", rounds=3, forgives=True)
        result = await Court(models).hear(toy, within_s=0.05)
        assert result.cause is Cause.VERDICT
        assert models.stopped <= 3

    async def test_cancelling_the_caller_stops_every_call_before_it_returns(self) -> None:
        models = Models(m_1=[hanging()], m_2=[hanging()])
        court = Court(models)
        hearing = asyncio.create_task(court.hear(Toy(id="toy", asks=("m-1", "m-2"))))
        for _ in range(2):
            await models.asked.acquire()
        hearing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hearing
        assert models.stopped == 2
        assert court.account.spent_usd > 0 == court.account.reserved_usd


class TestLimits:
    async def test_of_one_model_only_so_many_questions_are_under_way(self) -> None:
        models = Models(m_1=[YES], m_2=[YES])
        court = Court(models, concurrency=2)
        toys = [Toy(id="toy", asks=(model,)) for model in ("m-1", "m-2") for _ in range(5)]
        results = await asyncio.gather(*(court.hear(toy) for toy in toys))
        assert {result.outcome for result in results} == {Outcome.PASS}
        assert (models.most, len(models.calls)) == (4, 10)

    async def test_the_wait_for_a_place_counts_and_costs_nothing(self) -> None:
        models = Models(m_1=[hanging()])
        court = Court(models, concurrency=1)
        first = asyncio.create_task(court.hear(TOY, within_s=60))
        await models.asked.acquire()
        second = await court.hear(TOY, within_s=0.05)
        assert (second.cause, second.cost_usd, len(models.calls)) == (Cause.TIMEOUT, 0.0, 1)
        first.cancel()

    async def test_a_question_that_the_budget_does_not_cover_is_not_asked(self) -> None:
        models = Models(m_1=[YES])
        result = await Court(models, limit_usd=100).hear(TOY)
        assert (result.cause, result.cost_usd, models.calls) == (Cause.BUDGET, 0.0, [])

    async def test_a_model_that_is_down_is_left_alone_until_one_question_finds_it_well(
        self,
    ) -> None:
        down: list[Says | GatewayError] = [UpstreamError("gone")] * FAILURES
        models = Models(m_1=[*down, YES])
        court = Court(models)
        causes = [(await court.hear(TOY)).cause for _ in range(FAILURES + 3)]
        assert causes == FAILURES * [Cause.PROVIDER] + 3 * [Cause.UNAVAILABLE]
        assert court.interviewer.down == ["m-1"]
        court.clock.advance(PAUSE_S)
        assert (await court.hear(TOY)).outcome is Outcome.PASS
        assert court.interviewer.down == []

    async def test_a_question_that_cannot_even_be_written_leaves_the_way_free_for_the_next(
        self,
    ) -> None:
        down: list[Says | GatewayError] = [UpstreamError("gone")] * FAILURES
        court = Court(Models(m_1=[*down, YES]))
        for _ in range(FAILURES):
            await court.hear(TOY)
        court.clock.advance(PAUSE_S)
        unwritable = Toy(id="toy", parameters={"seed": 2**70})
        assert (await court.hear(unwritable)).cause is Cause.RAISED
        assert (await court.hear(TOY)).outcome is Outcome.PASS

    @pytest.mark.parametrize(
        ("answer", "is_fair", "down"),
        [
            (hanging, True, ["m-1"]),
            (hanging, False, []),
            (lambda: refusal("too long", 400), True, []),
            (lambda: says("perhaps"), True, []),
        ],
        ids=["too slow", "impatient client", "the question", "the verdict"],
    )
    async def test_only_what_is_the_models_failing_counts_against_it(
        self, answer: Any, is_fair: bool, down: list[str]
    ) -> None:
        court = Court(Models(m_1=[answer()]))
        for _ in range(FAILURES):
            await court.hear(TOY, within_s=0.02, is_fair=is_fair)
        assert court.interviewer.down == down


class TestParameters:
    async def test_a_refused_parameter_is_left_out_and_asked_for_again_after_a_while(self) -> None:
        models = Models(m_1=[refusal("'seed' is not supported"), YES])
        court = Court(models)
        toy = Toy(id="toy", parameters={"seed": 1, "max_tokens": 9})
        for _ in range(2):
            assert (await court.hear(toy)).outcome is Outcome.PASS
        court.clock.advance(600)
        await court.hear(toy)
        assert ["seed" in models.body(number) for number in range(4)] == [True, False, False, True]
        assert all(models.body(number)["max_tokens"] == 9 for number in range(4))

    async def test_logprobs_are_not_asked_of_a_model_that_gives_none(self) -> None:
        models = Models(m_1=[refusal("logprobs are not for you"), YES])
        toy = Toy(id="toy", parameters={"logprobs": True, "top_logprobs": 5})
        await Court(models).hear(toy)
        assert models.body(0)["top_logprobs"] == 5
        assert not {"logprobs", "top_logprobs"} & models.body(1).keys()

    async def test_a_refusal_that_names_nothing_of_ours_is_an_error(self) -> None:
        models = Models(m_1=[refusal("'messages' are too long")])
        result = await Court(models).hear(Toy(id="toy", parameters={"seed": 1}))
        assert (result.cause, len(models.calls)) == (Cause.PROVIDER, 1)
        assert result.error == "the provider of m-1 answered 400 (no)"


def key(judge: Judge, exchange: Exchange) -> str | None:
    """What identifies the judge's question on this exchange."""
    return begin(judge, exchange).key


class TestKey:
    def test_the_same_question_has_the_same_key_whatever_the_check_is_called(self) -> None:
        one, other = Toy(id="a", on_fail=OnFail.FLAG), Toy(id="b", on_error=OnError.BLOCK)
        assert key(one, EXCHANGE) == key(other, EXCHANGE) is not None

    @pytest.mark.parametrize(
        "changes",
        [{"asks": ("m-2",)}, {"pass_at": 0.9}, {"parameters": {"seed": 1}}, {"rounds": 2}],
        ids=str,
    )
    def test_whatever_matters_changes_the_key(self, changes: dict[str, Any]) -> None:
        assert key(Toy(id="toy", **changes), EXCHANGE) != key(Toy(id="toy"), EXCHANGE)

    def test_what_is_judged_changes_the_key(self) -> None:
        assert key(Toy(id="toy"), exchange(None, None)) != key(Toy(id="toy"), EXCHANGE)

    def test_a_judge_that_asks_nothing_has_no_key(self) -> None:
        assert key(Toy(id="toy", rounds=0), EXCHANGE) is None


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ("1.1 holdgate-judge", True),
        ("1.0 fred, 1.1 holdgate-judge", True),
        ("HTTP/2  holdgate-judge (x)", True),
        ("1.1 holdgate-judge.example", False),
        ("holdgate-judge", False),
        ("", False),
    ],
)
def test_a_judges_question_is_known_by_its_via(value: str, ours: bool) -> None:
    assert is_from_judge([("host", "holdgate-judge"), ("via", value)]) is ours
