"""`holdgate demo`: a scripted model, a gateway, a handful of requests, and what became of each."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import httpx
import msgspec
import openai
from rich.console import Console
from rich.table import Table

from gateway.demo.processes import is_taken, server
from gateway.demo.scenarios import MODEL, SCENARIOS, Scenario
from gateway.settings import PACKAGED_CONFIG

#: How wide the table is where nobody says: in a file or a pipe.
_WIDTH_CHARS = 132
_SHOWN = (
    "support",
    "tag",
    "unsure",
    "ungrounded",
    "personal_data",
    "refund_small",
    "refund_mended",
    "refund_large",
    "leak",
)


class Result(msgspec.Struct, frozen=True):
    """What became of one request."""

    scenario: Scenario
    decision: dict[str, object]
    got: str

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of its row in the table."""
        inner = self.decision["detail"]["decision"]  # type: ignore[index]
        confidence = self.decision["confidence"]
        return (
            self.scenario.title,
            f"{confidence:.2f}" if isinstance(confidence, float) else "none",
            str(self.decision["risk"]),
            str(inner["zone"]),
            str(self.decision["action"]),
            self.got,
        )


def show(port: int, *, once: bool) -> int:
    """Run the demo; the exit code. Stays up until interrupted, unless `once`."""
    out = Console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _WIDTH_CHARS
    if is_taken(port):
        out.print(f"Port {port} is in use; choose another: [b]holdgate demo --port 8081[/b]")
        return 1
    with tempfile.TemporaryDirectory(prefix="holdgate-demo-") as name:
        folder = Path(name)
        with (
            server(folder, "demo-upstream", "--port", "0") as upstream,
            server(folder, "serve", "--config", str(_write_config(folder, upstream, port))) as url,
        ):
            out.print(
                f"A scripted model answers on {upstream}; Holdgate stands before it on {url}.\n"
            )
            by_name = {scenario.name: scenario for scenario in SCENARIOS}
            results = [_ask(url, by_name[name]) for name in _SHOWN]
            out.print(_table(results))
            out.print(_next_steps(url, results), highlight=False, soft_wrap=True)
            if not once:
                _until_stopped()
    return 0


def _write_config(folder: Path, upstream: str, port: int) -> Path:
    """The starter configuration before the scripted model; every label is audited, so that the table shows it."""
    shutil.copytree(PACKAGED_CONFIG, folder, dirs_exist_ok=True)
    tagging = folder / "policies" / "20-tagging.yaml"
    tagging.write_text(
        tagging.read_text("utf-8").replace("audit: {rate: 0.05}", "audit: {rate: 1.0}"), "utf-8"
    )
    config = folder / "holdgate.yaml"
    config.write_text(
        f"listen: {{port: {port}}}\n"
        "policies: policies/\n"
        "calibrators: calibrators/\n"
        f"store: {{url: 'sqlite:///{folder}/holdgate.db'}}\n"
        f"models: [{{match: '*', base_url: '{upstream}/v1'}}]\n"
        "log: {level: warning}\n",
        "utf-8",
    )
    return config


def _ask(url: str, scenario: Scenario) -> Result:
    """Send one request as any application would, with the stock client."""
    client = openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="demo",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": scenario.prompt}],
            metadata=dict(scenario.metadata),
            extra_headers={"Prefer": "wait=0"},
            **scenario.request,
        )
        headers, message = raw.headers, raw.parse().choices[0].message
        calls = [
            f"{c.function.name}({c.function.arguments})"
            for c in message.tool_calls or ()
            if c.type == "function"
        ]
        got = message.content or " ".join(calls)
    except openai.APIStatusError as error:
        headers, got = error.response.headers, f"{error.status_code} {error.code}"
    decision = (
        httpx.get(f"{url}/decisions/{headers['x-holdgate-decision']}", trust_env=False)
        .raise_for_status()
        .json()
    )
    return Result(scenario, decision, got)


def _table(results: list[Result]) -> Table:
    table = Table("Request", "Confidence", "Risk", "Zone", "Action", show_lines=True)
    table.add_column("What the client got", min_width=26)
    colours = {"return": "green", "flag": "yellow", "hold": "magenta", "block": "red"}
    for result in results:
        cells = result.row
        table.add_row(
            *cells[:4], f"[{colours[cells[4]]}]{cells[4]}[/]", cells[5].replace("[", r"\[")
        )
    return table


def _next_steps(url: str, results: list[Result]) -> str:
    held = next(r.decision for r in results if r.scenario.name == "refund_large")
    task = held["review"]["id"]  # type: ignore[index]
    return f"""
[b]A response waits for a person.[/b] {_least_likely(held)}Approve it from another terminal, then fetch it as its client would:

  curl -s {url}/review/queue
  curl -s {url}/review/{task}/submit -H 'content-type: application/json' -d '{{"verdict": "approve"}}'
  curl -s {url}/v1/chat/completions/{held["id"]}

[b]A client that waits[/b] gets its answer the moment it is approved (for 50 s, then 423):

  curl -sN {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model": "{MODEL}", "stream": true,
    "metadata": {{"task": "refund_decision"}}, "messages": \\[{{"role": "user", "content": "Please refund all $25,000."}}]}}'

[b]Your own application:[/b] OpenAI(base_url="{url}/v1", api_key="any"). Ready: {url}/readyz, metrics: {url}/metrics
"""


def _least_likely(decision: dict[str, object]) -> str:
    fields = decision["detail"]["evidence"]["fields"]  # type: ignore[index]
    if not fields:
        return ""
    name = fields[0]["path"].partition("#")[2]
    return f"Its least likely value is {name}, token probability {fields[0]['token_probability']:.4f}. "


def _until_stopped() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    Console().print("Running until Ctrl-C.")
    stopped.wait()
