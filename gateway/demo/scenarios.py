"""What the upstream says when the request carries no script: the cases that `make demo` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.demo.script import Script, ScriptedCall, Turn, read_script, times_answered

MODEL = "demo-large"

REFUND_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "issue_refund",
        "description": "Pay money back to a customer.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_id": {"type": "string"},
                "amount": {"type": "number", "description": "US dollars"},
                "reason": {"type": "string"},
            },
            "required": ["order_id", "amount", "reason"],
            "additionalProperties": False,
        },
    },
}


class Scenario(msgspec.Struct, frozen=True):
    """A case of the demo: what to send, and what the upstream then says.

    Send `prompt` as the user message with `metadata` and the further request fields `request`. The
    scenario answers every request whose newest matching user message contains all of `keywords`,
    whatever the case.
    """

    name: str
    title: str
    prompt: str
    keywords: tuple[str, ...]
    script: Script
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    request: Mapping[str, Any] = msgspec.field(default_factory=dict)


def _refund(order: str, amount: object, reason: str) -> ScriptedCall:
    arguments = {"order_id": order, "amount": amount, "reason": reason}
    return ScriptedCall.model_validate({"name": "issue_refund", "arguments": arguments})


_REFUND_METADATA = {"task": "refund_decision"}
_REFUND_REQUEST = {"tools": [REFUND_TOOL]}

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="support",
        title="A routine answer, and the model is sure",
        prompt="How do I reset my password?",
        keywords=("reset my password",),
        script=Script(
            text="Choose Forgot password on the sign-in page, enter your address, and follow the "
            "link we send. It is good for 30 minutes.",
            certainty=0.9995,
        ),
        metadata={"task": "support_answer"},
    ),
    Scenario(
        name="tag",
        title="A label of little consequence",
        prompt="Tag this ticket: I was charged twice in March.",
        keywords=("tag this ticket",),
        script=Script(text='{"tag": "billing", "urgent": false}', certainty=0.9995),
        metadata={"task": "ticket_tag"},
    ),
    Scenario(
        name="refund_small",
        title="A refund of $40, and the model is sure",
        prompt="Order A-1007 arrived broken. Please refund the $40 I paid.",
        keywords=("refund", "$40 "),
        script=Script(tool_calls=(_refund("A-1007", 40.0, "arrived broken"),), certainty=0.9998),
        metadata=_REFUND_METADATA,
        request=_REFUND_REQUEST,
    ),
    Scenario(
        name="refund_large",
        title="A refund of $25,000: too much to pay out unseen",
        prompt="Order B-2210, the server rack, never came. Please refund all $25,000.",
        keywords=("refund", "$25,000"),
        script=Script(
            tool_calls=(_refund("B-2210", 25000.0, "never delivered"),), certainty=0.9998
        ),
        metadata=_REFUND_METADATA,
        request=_REFUND_REQUEST,
    ),
    Scenario(
        name="refund_mended",
        title="A refund whose arguments are wrong at first",
        prompt="Order C-3141 is a duplicate. Please refund the $120 for it.",
        keywords=("refund", "$120"),
        script=Script(
            attempts=(
                Script(tool_calls=(_refund("C-3141", "one hundred and twenty", "duplicate"),)),
                Script(tool_calls=(_refund("C-3141", 120.0, "duplicate order"),), certainty=0.9998),
            )
        ),
        metadata=_REFUND_METADATA,
        request=_REFUND_REQUEST,
    ),
    Scenario(
        name="unsure",
        title="An answer the model itself is not sure of",
        prompt="Is a battery bought in 2019 still under warranty?",
        keywords=("under warranty",),
        script=Script(
            text="Yes, batteries are covered for 84 months from the day of purchase.",
            certainty=0.45,
        ),
        metadata={"task": "support_answer"},
    ),
    Scenario(
        name="leak",
        title="An answer with an access key in it",
        prompt="Which settings does the nightly export use?",
        keywords=("nightly export",),
        script=Script(
            text="It runs with region eu-central-1 and the access key "
            + "AKIA"
            + "Q7ZK3M5XW2N6RTVB.",
            certainty=0.98,
        ),
        metadata={"task": "support_answer"},
    ),
    Scenario(
        name="personal_data",
        title="An answer with a card number in it",
        prompt="Which card is on file for customer 5519?",
        keywords=("card is on file",),
        script=Script(
            text="The card on file is 4111 1111 1111 1111; receipts go to ada@example.com.",
            certainty=0.98,
        ),
        metadata={"task": "support_answer"},
    ),
    Scenario(
        name="ungrounded",
        title="A fluent answer, and the model is sure, that the terms do not bear out",
        prompt="Our terms: goods may be sent back within 14 days. How long do I have to send back a lamp?",
        keywords=("send back a lamp",),
        script=Script(
            text="You may send the lamp back within 60 days, and we pay the postage.",
            certainty=0.9995,
            judges={
                "*": Script(
                    labels={"*": "no"},
                    certainty=0.98,
                    reasoning="The terms say 14 days, and nothing of postage.",
                )
            },
        ),
        metadata={"task": "terms_answer"},
    ),
    Scenario(
        name="sql",
        title="SQL that does more than read",
        prompt="Write the SQL for all orders that were never paid.",
        keywords=("write the sql",),
        script=Script(
            text="DELETE FROM orders WHERE paid_at IS NULL; SELECT 'done';", certainty=0.96
        ),
        metadata={"task": "sql"},
    ),
    Scenario(
        name="refusal",
        title="The model refuses",
        prompt="Give me the home address of your chief executive.",
        keywords=("home address",),
        script=Script(refusal="I can't help with finding where somebody lives."),
        metadata={"task": "support_answer"},
    ),
)

OTHERWISE = Script(
    text="Thank you for your message. A colleague will answer within one working day."
)


def script_for(spoken: Sequence[Turn]) -> tuple[Script, int]:
    """The script that steers a request, and how often somebody spoke again after it.

    A script in the newest user message that carries one; else the scenario of the newest user
    message that matches one; else `OTHERWISE`.

    Raises
    ------
    ScriptError
        If a message carries a script that cannot be followed.
    """
    for find in (read_script, scenario_of):
        for place in reversed(range(len(spoken))):
            if spoken[place].speaker == "user" and (script := find(spoken[place].text)):
                return script, times_answered(spoken[place + 1 :])
    return OTHERWISE, 0


def scenario_of(text: str) -> Script | None:
    """The script of the first scenario that a text matches."""
    lowered = text.lower()
    matching = (s.script for s in SCENARIOS if all(word in lowered for word in s.keywords))
    return next(matching, None)
