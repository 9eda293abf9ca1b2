"""Whether the model finished, and with an answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from validators.base import CheckResult, Choice, Exchange, Finding, Validator

#: What the providers say when the token limit cut the answer off (chat completions; responses).
TRUNCATED = frozenset({"length", "max_output_tokens", "max_tokens", "incomplete"})


class FinishReason(Validator):
    """Fails for each choice that did not finish as allowed, says nothing at all, or is a refusal.

    `allow` lists finish reasons (chat, completions) and response states (responses).
    """

    use: Literal["finish_reason"]
    allow: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "stop",
        "tool_calls",
        "function_call",
        "completed",
    )
    refusal: Literal["allow", "fail"] = "fail"

    def run(self, exchange: Exchange) -> CheckResult:
        """FAIL with findings named truncated, content_filter, unfinished, empty or refusal."""
        findings: list[Finding] = []
        for choice in exchange.choices:
            if choice.finish_reason not in self.allow:
                findings.append(_unfinished(choice))
            if choice.refusals:
                if self.refusal == "fail":
                    path = choice.refusals[0].path
                    findings.append(Finding(path, "the model refused to answer", rule="refusal"))
            elif not choice.tool_calls and not any(
                passage.text.strip() for passage in choice.texts
            ):
                findings.append(
                    Finding(choice.path, "there is no text and no tool call", rule="empty")
                )
        return self.verdict(findings)


def _unfinished(choice: Choice) -> Finding:
    reason = choice.finish_reason
    path = f"{choice.path}.finish_reason"
    if reason in TRUNCATED:
        return Finding(
            path, f"the answer is cut off ({reason}): raise the token limit", rule="truncated"
        )
    if reason == "content_filter":
        return Finding(path, "the provider's content filter cut the answer", rule="content_filter")
    said = f"is {reason[:40]!r}" if reason else "is missing"
    return Finding(path, f"the finish reason {said}, which is not allowed", rule="unfinished")
