from __future__ import annotations

from types import MappingProxyType
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.expressions import (
    MAX_EVALUATIONS,
    MAX_SOURCE_CHARS,
    ExpressionError,
    MissingValue,
    Variables,
    compile_expression,
)
from policies.model import RiskTier
from validators import CheckResult, Choice, Exchange, Finding, Outcome, Passage, ToolCall


def call(name: str, arguments: str) -> ToolCall:
    return ToolCall(name, Passage(f"calls.{name}", arguments))


def said(*texts: str, calls: tuple[ToolCall, ...] = ()) -> Choice:
    return Choice("choices[0]", tuple(Passage("text", text) for text in texts), tool_calls=calls)


def seen(*choices: Choice, **known: Any) -> Variables:
    of_exchange = {key: known.pop(key) for key in ("task", "model", "context") if key in known}
    exchange = Exchange("chat", known.pop("request", {}), choices, **of_exchange)
    return Variables(exchange, **{"results": {}, **known})


def holds(source: str, variables: Variables, ids: tuple[str, ...] = ()) -> bool:
    return compile_expression(source, ids).holds(variables)


TIERS = (
    "tiers are written LOW, MEDIUM, HIGH, CRITICAL without quotes, "
    "and every value of context is text, such as 'true'"
)


@pytest.mark.parametrize(
    ("source", "line", "column", "message"),
    [
        ("scor < 0.5", 1, 1, "unknown variable 'scor'; did you mean 'score'?"),
        ("true && risk >= high", 1, 17, "unknown variable 'high'; did you mean 'HIGH'?"),
        (
            "1.0 < checks.groundd.score",
            1,
            7,
            "unknown variable 'checks.groundd.score'; did you mean 'checks.grounded.score'?",
        ),
        (
            "checks.grounded.scroe < 0.5",
            1,
            1,
            "unknown variable 'checks.grounded.scroe'; did you mean 'checks.grounded.score'?",
        ),
        (
            "tool.argumnets.amount > 1",
            1,
            1,
            "unknown variable 'tool.argumnets.amount'; did you mean 'tool.arguments'?",
        ),
        ("task == 'é' &&\n  rsk > 1", 2, 3, "unknown variable 'rsk'; did you mean 'risk'?"),
        ("sise(task) > 1", 1, 5, "unknown function 'sise'"),
        (
            "score < 1",
            1,
            7,
            "'<' cannot be applied to double and int; "
            "write whole numbers with a decimal point, such as 1.0",
        ),
        (
            "context.paid == true",
            1,
            14,
            "'==' cannot be applied to string and bool; " + TIERS,
        ),
        ("task.size() == 'a'", 1, 13, "'==' cannot be applied to int and string; " + TIERS),
        ("request == 1u + 1", 1, 15, "'+' cannot be applied to uint and int"),
        ("!task", 1, 1, "'!' cannot be applied to string"),
        ("score", 1, 1, "has type double, not bool; compare it with something"),
        ("request.stream", 1, 1, "has type dyn, not bool; compare it with something"),
        (
            "risk > LOW && has( tool.arguments )",
            1,
            20,
            "has() takes a field, and tool.arguments is a whole variable; "
            "write for example has(tool.arguments.amount)",
        ),
        ("has(context)", 1, 5, "has() argument must be a field selection"),
        ("score <", 1, 8, "ends too soon"),
        ("score < 0.5 )", 1, 13, "syntax error near ')'"),
        ("", 1, 1, "ends too soon"),
        ("(" * 100, 1, 1, "not a CEL expression"),
        ("task == '\ud800'", 1, 1, "not a CEL expression"),
        ("x" * (MAX_SOURCE_CHARS + 1), 1, 1, "longer than 4096 characters"),
    ],
)
def test_what_cannot_be_compiled_is_refused_where_it_is_wrong(
    source: str, line: int, column: int, message: str
) -> None:
    with pytest.raises(ExpressionError) as caught:
        compile_expression(source, ["grounded"])
    assert (caught.value.line, caught.value.column, str(caught.value)) == (line, column, message)


def test_unknown_variable_that_resembles_none_lists_those_there_are() -> None:
    with pytest.raises(ExpressionError, match=r"known are risk, LOW, .*tool\.arguments$"):
        compile_expression("zzzzzz == 1", ())


@pytest.mark.parametrize("amount", ["12000", "12000.5"])
@pytest.mark.parametrize("limit", ["10000", "10000.0"])
def test_json_numbers_compare_whichever_way_they_are_written(amount: str, limit: str) -> None:
    variables = seen(said(calls=(call("pay", f'{{"amount": {amount}}}'),)))
    assert holds(f"tool.arguments.amount > {limit}", variables)
    assert not holds(f"tool.arguments.amount < {limit}", variables)


def test_whole_json_numbers_equal_the_same_number_with_a_decimal_point() -> None:
    variables = seen(said(calls=(call("pay", '{"amount": 12000}'),)))
    assert holds("tool.arguments.amount == 12000.0", variables)
    assert holds("tool.arguments.amount in [12000.0]", variables)


def test_json_numbers_are_only_added_to_numbers_of_their_own_kind() -> None:
    variables = seen(said(calls=(call("pay", '{"amount": 12000.5}'),)))
    with pytest.raises(MissingValue, match=r"\+ cannot be applied to double, int64"):
        holds("tool.arguments.amount + 1 > 0", variables)
    assert holds("double(tool.arguments.amount) + 1.0 > 12001.0", variables)


@pytest.mark.parametrize("tier", RiskTier)
def test_every_tier_is_a_constant_equal_to_its_rank(tier: RiskTier) -> None:
    assert holds(f"risk == {tier.name}", seen(risk=tier.rank))
    assert holds("risk >= HIGH", seen(risk=tier.rank)) is (tier.rank >= RiskTier.HIGH.rank)


def test_tool_expression_holds_if_it_is_true_of_any_call() -> None:
    calls = (call("look", '{"amount": 99}'), call("pay", '{"amount": 20}'))
    variables = seen(said(calls=calls[:1]), said(calls=calls[1:]))
    assert holds("tool.name == 'pay' && tool.arguments.amount == 20", variables)
    assert not holds("tool.name == 'pay' && tool.arguments.amount == 99", variables)


def test_tool_expression_does_not_hold_without_a_tool_call() -> None:
    assert not holds("tool.name != 'pay'", seen(said("hello")))


def test_tool_arguments_that_are_no_json_are_a_missing_value_unless_another_call_settles_it() -> (
    None
):
    broken, fine = call("pay", '{"amount":'), call("pay", '{"amount": 20}')
    with pytest.raises(MissingValue, match="arguments of a tool call are not JSON"):
        holds("tool.arguments.amount > 50", seen(said(calls=(broken, fine))))
    assert holds("tool.arguments.amount > 10", seen(said(calls=(broken, fine))))
    assert not holds("tool.name == 'x' && tool.arguments.amount > 10", seen(said(calls=(broken,))))


def test_tool_arguments_that_are_no_object_are_a_missing_value() -> None:
    with pytest.raises(MissingValue, match=r"^a value that should be an object is not one$"):
        holds("tool.arguments.amount > 50", seen(said(calls=(call("pay", "[1]"),))))


def test_missing_tool_argument_is_a_missing_value_that_names_the_key() -> None:
    variables = seen(said(calls=(call("pay", "{}"),)))
    with pytest.raises(MissingValue, match=r"^there is no key 'amount'$"):
        holds("tool.arguments.amount > 50", variables)
    assert not holds("has(tool.arguments.amount) && tool.arguments.amount > 50", variables)


def test_output_expression_looks_at_every_choice_with_text() -> None:
    expression = "output.total > 10.0"
    assert holds(expression, seen(said('{"total": 1}'), said('{"total": 11}')))
    assert not holds(expression, seen(said('{"total": 1}'), said(calls=(call("pay", "{}"),))))
    assert holds(expression, seen(said('{"total":', " 11}")))
    with pytest.raises(MissingValue, match=r"^the answer is not JSON$"):
        holds(expression, seen(said('{"total": 1}'), said("eleven")))


def test_output_and_tool_together_are_evaluated_within_one_choice() -> None:
    first = said('{"paid": true}', calls=(call("pay", '{"amount": 1}'),))
    second = said('{"paid": false}', calls=(call("pay", '{"amount": 9}'),))
    assert holds("output.paid && tool.arguments.amount == 1", seen(first, second))
    assert not holds("output.paid && tool.arguments.amount == 9", seen(first, second))


def test_json_null_is_a_value_and_not_a_missing_one() -> None:
    assert holds("output == null", seen(said("null")))


@pytest.mark.parametrize(
    "source",
    ["output.x == 1", "tool.name == 'x'", "score > 0.0", "confidence > 0.0", "checks.a.error"],
)
def test_what_only_the_response_can_tell_does_not_hold_before_it(source: str) -> None:
    assert not holds(source, seen(results=None), ("a",))


def test_request_context_task_and_model_are_known_before_the_response() -> None:
    variables = seen(
        results=None,
        task="refund",
        model="gpt-4o",
        request=MappingProxyType({"tools": [{"name": "pay"}]}),
        context=MappingProxyType({"tier": "gold"}),
    )
    source = (
        "task == 'refund' && model.startsWith('gpt') && context.tier == 'gold' "
        "&& request.tools.exists(each, each.name == 'pay')"
    )
    assert holds(source, variables)


def test_task_that_was_not_named_is_the_empty_text() -> None:
    assert holds("task == '' && model == ''", seen())


def test_context_key_that_is_not_there_is_a_missing_value() -> None:
    with pytest.raises(MissingValue, match="there is no key 'is_new_user'"):
        holds("context.is_new_user == 'true'", seen())
    assert not holds("has(context.is_new_user) && context.is_new_user == 'true'", seen())


@pytest.mark.parametrize("name", ["score", "confidence"])
def test_unknown_score_is_a_missing_value_unless_the_rest_settles_it(name: str) -> None:
    with pytest.raises(MissingValue, match=f"^{name} is not known$"):
        holds(f"{name} < 0.5", seen())
    assert holds(f"risk >= HIGH || {name} < 0.5", seen(risk=2))
    assert holds(f"{name} < 0.5", seen(**{name: 0.4}))


def test_check_variables_say_what_the_check_said() -> None:
    failed = CheckResult("a", Outcome.FAIL, score=0.0, findings=(Finding("p", "m"),) * 3)
    variables = seen(results={"a": failed})
    source = "checks.a.failed && !checks.a.error && checks.a.score == 0.0 && checks.a.findings == 3"
    assert holds(source, variables, ("a",))


@pytest.mark.parametrize(
    "attribute", ["!checks.a.failed", "checks.a.findings == 0", "checks.a.score > 0.0"]
)
def test_check_that_could_not_tell_has_an_error_and_nothing_else(attribute: str) -> None:
    variables = seen(results={"a": CheckResult("a", Outcome.ERROR, error="down")})
    with pytest.raises(MissingValue):
        holds(attribute, variables, ("a",))
    assert holds("checks.a.error", variables, ("a",))


@pytest.mark.parametrize("attribute", ["checks.a.failed", "checks.a.error"])
def test_check_that_has_not_run_is_a_missing_value(attribute: str) -> None:
    with pytest.raises(MissingValue):
        holds(attribute, seen(), ("a",))


def test_expression_over_budget_is_a_missing_value() -> None:
    variables = seen(request={"x": list(range(200))})
    source = "request.x.all(a, request.x.all(b, a + b > -1))"
    with pytest.raises(MissingValue, match=r"^the expression costs more than its budget$"):
        holds(source, variables)


def test_evaluations_of_one_expression_are_bounded() -> None:
    calls = tuple(call("look", "{}") for _ in range(MAX_EVALUATIONS))
    assert not holds("tool.name == 'pay'", seen(said(calls=calls)))
    with pytest.raises(MissingValue, match="more than 256 tool calls"):
        holds("tool.name == 'pay'", seen(said(calls=(*calls, call("pay", "{}")))))


def test_reasons_never_quote_what_the_response_says() -> None:
    secret = said(calls=(call("hunter2", '{"amount": "hunter2", "big": 1e400}'),))
    for source in ("tool.arguments.amount > 1", "int(tool.name) > 1", "context[tool.name] == ''"):
        with pytest.raises(MissingValue) as caught:
            holds(source, seen(secret))
        assert "hunter2" not in str(caught.value)


def test_names_are_the_declared_variables_referred_to_and_no_others() -> None:
    source = "tool.arguments.all(task, task.x > 1) && model == 'request.x' && checks.a.failed"
    expression = compile_expression(source, ["a", "b"])
    assert expression.names - {"task"} == {"tool.arguments", "model", "checks.a.failed"}
    assert expression.checks == {"a"}
    assert expression.needs_response
    assert not compile_expression("request.output == 'score'", ()).needs_response


_WORDS = """risk score task context request output tool .arguments .name .x checks.a.failed checks.a
( ) [ ] { } && || ! == < + - 1 1.0 1u 'x' " ' has in null true .all(x, .map(x, ? : , é 😀
.matches('(') size( int( dyn( type( 9223372036854775807 @ `a` .?x HIGH"""
_PIECES = st.sampled_from([*_WORDS.split(), " ", "\n", "\u2028", "\x00"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "arguments"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    source=st.lists(_PIECES, max_size=14).map("".join) | st.text(max_size=30),
    value=_JSON,
    text=st.text(max_size=4) | st.just("\ud800"),
    score=st.none() | st.floats(0, 1),
)
def test_any_text_compiles_or_is_refused_and_then_evaluates_or_is_missing(
    source: str, value: Any, text: str, score: float | None
) -> None:
    refusal: ExpressionError | None = None
    try:
        expression = compile_expression(source, ["a"])
    except ExpressionError as error:
        refusal = error
    if refusal is not None:
        assert refusal.line >= 1
        assert refusal.column >= 1
        return
    try:
        answer = orjson.dumps(value).decode()
    except TypeError:
        answer = "{"
    choice = said(answer, calls=(call("x", answer),))
    variables = seen(choice, request={"x": value}, task=text, context={text: text}, score=score)
    held: bool | MissingValue
    try:
        held = expression.holds(variables)
    except MissingValue as missing:
        held = missing
    assert held in (True, False) or str(held)
