"""What an application does with the official client, whatever its version: run by `test_openai_next`, in another environment.

Arguments: the gateway's URL and the upstream's. Ends with status 0 once everything went as it should.
"""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import openai

MODEL = "demo-large"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "issue_refund", "parameters": {"type": "object"}},
}


class Application:
    """Somebody's program, and the reviewer who reads what its model says."""

    def __init__(self, gateway: str, upstream: str) -> None:
        self.gateway = gateway
        self.upstream = upstream

    def client(self, task: str, mark: str = "") -> openai.OpenAI:
        """A client as it comes, retries and all."""
        headers = {"x-holdgate-task": task, "x-mark": mark}
        return openai.OpenAI(
            base_url=f"{self.gateway}/v1", api_key="sk-test-client", default_headers=headers
        )

    def plain(self) -> None:
        """A response arrives, with its decision in the headers."""
        raw = self.client("plain").chat.completions.with_raw_response.create(
            model=MODEL, messages=said(text="Hello, Grüße, 你好.")
        )
        assert raw.headers["x-holdgate-action"] == "return"
        assert raw.parse().choices[0].message.content == "Hello, Grüße, 你好."

    def stream(self) -> None:
        """A stream arrives whole, usage included."""
        chunks = list(
            self.client("plain").chat.completions.create(
                model=MODEL,
                messages=said(text="One two three."),
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "One two three."
        assert chunks[-1].usage is not None

    def tools(self) -> None:
        """Tool calls arrive whole, streamed or not."""
        arguments = {"order_id": "A-1", "amount": 40.5}
        request: dict[str, Any] = {
            "model": MODEL,
            "messages": said(tool_calls=[{"name": "issue_refund", "arguments": arguments}]),
            "tools": [TOOL],
        }
        completions = self.client("plain").chat.completions
        with completions.stream(**request) as stream:
            streamed = stream.get_final_completion()
        for completion in (completions.create(**request), streamed):
            calls: Any = completion.choices[0].message.tool_calls
            (call,) = calls
            assert call.function.name == "issue_refund"
            assert json.loads(call.function.arguments) == arguments

    def hold(self) -> None:
        """A hold is one 423 and not three; once approved, the response can be fetched."""
        client = self.client("hold", "next-held")
        messages = said(text="Held for version 3.")
        error = refused(lambda: client.chat.completions.create(model=MODEL, messages=messages))
        assert (error.status_code, error.code) == (423, "response_held")
        calls = self._get(f"{self.upstream}/calls")["calls"]
        assert sum(call["headers"].get("x-mark") == "next-held" for call in calls) == 1
        completion = client.chat.completions.retrieve(self._approved(error))
        assert completion.choices[0].message.content == "Held for version 3."

    def responses(self) -> None:
        """The Responses API: plain, held, and fetched once approved."""
        prompt = said(text="From the Responses API.")[0]["content"]
        answer = self.client("plain").responses.create(model=MODEL, input=prompt)
        assert answer.output_text == "From the Responses API."
        client = self.client("hold")
        error = refused(lambda: client.responses.create(model=MODEL, input=prompt))
        assert error.code == "response_held"
        assert (
            client.responses.retrieve(self._approved(error)).output_text
            == "From the Responses API."
        )

    def blocked(self) -> None:
        """A blocked response is a `PermissionDeniedError`."""
        completions = self.client("guard").chat.completions
        messages = said(text="The door opens with CODE-1234.")
        error = refused(lambda: completions.create(model=MODEL, messages=messages))
        assert isinstance(error, openai.PermissionDeniedError)
        assert error.code == "response_blocked"

    def upload(self) -> None:
        """A file is uploaded byte for byte."""
        content = bytes(range(256)) * 1000
        file = self.client("plain").files.create(
            file=("Übersicht.bin", content), purpose="user_data"
        )
        told = file.model_dump()
        assert told["filename"] == "Übersicht.bin"
        assert told["sha256"] == hashlib.sha256(content).hexdigest()

    def _approved(self, error: openai.APIStatusError) -> str:
        """The id of the held response, once it has been approved."""
        body: Any = error.body
        decision_id = str(body["hold"]["id"])
        task = self._get(f"{self.gateway}/decisions/{decision_id}")["review"]["id"]
        self._get(f"{self.gateway}/review/{task}/submit", {"verdict": "approve"})
        return decision_id

    def _get(self, url: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)


def refused(ask: Callable[[], object]) -> openai.APIStatusError:
    """The error that asking ends with."""
    try:
        answer = ask()
    except openai.APIStatusError as error:
        return error
    raise AssertionError(f"it was not refused: {answer}")


def said(**script: Any) -> Any:
    """Messages that tell the upstream what to say."""
    return [{"role": "user", "content": json.dumps({"demo": script})}]


def main(gateway: str, upstream: str) -> None:
    """Do everything once, and say with which version."""
    application = Application(gateway, upstream)
    application.plain()
    application.stream()
    application.tools()
    application.hold()
    application.responses()
    application.blocked()
    application.upload()
    sys.stdout.write(f"openai {openai.__version__}: everything works\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
