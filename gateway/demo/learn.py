"""`holdgate demo-learn`: from no confidence at all to a threshold that is promised, what became of the promise, and drift.

Everything is real: the model, its mistakes, the gateway, its store, the review API and the commands. What reviewers know, the right
answers, comes with the orders.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.demo.orders import Order, orders
from gateway.demo.processes import server
from gateway.policy_files import load
from policies import load_calibrator
from policies.agreement import contradicted

_ALPHA, _DELTA = 0.05, 0.05
#: What is rarer than this among fresh orders, if the promise is true, breaks it.
_CHANCE = 0.01
_OBSERVED, _ENFORCED = 1_500, 2_000
_AT_ONCE = 8
_QUEUE = 200
_WAIT_S = 30.0

#: How wide tables are where nobody says: in a file or a pipe.
_WIDTH_CHARS = 132

#: Noisy orders come in batches, no faster than this, because monitors look every two seconds.
_BATCH, _BATCH_S = 50, 1.2
#: How many more are sent after the alarm, to see what it does.
_AFTER_ALARM = 300

_POLICY = """\
# Orders that a model reads: at first nothing is known of its confidence, so answers are only observed, and all are reviewed.
policy: orders
match: {task: orders}
mode: observe
risk: {base: medium}
confidence: {when_uncalibrated: hold}
matrix:
  medium: {confident: return, unsure: hold, doubtful: hold}
hold: {wait: 0s, deadline: 1h}
audit: {rate: 0.2, adaptive: {min: 0.1, max: 0.5, target: 0.05}}
"""


@dataclass(slots=True)
class Tally:
    """What became of a stretch of traffic; errors are those among what was returned."""

    sent: int = 0
    returned: int = 0
    errors: int = 0

    @property
    def held(self) -> int:
        """How many waited for a person."""
        return self.sent - self.returned

    @property
    def error_rate(self) -> float:
        """Errors among what was returned."""
        return self.errors / max(self.returned, 1)

    def add(self, was_returned: bool, is_right: bool) -> None:
        """Count one answer."""
        self.sent += 1
        self.returned += was_returned
        self.errors += was_returned and not is_right


@dataclass(slots=True)
class Application:
    """The application that sends orders, and the reviewers who know what is right."""

    url: str
    http: aiohttp.ClientSession
    sent: dict[str, Order] = field(default_factory=dict)

    async def send(self, order: Order, tally: Tally) -> None:
        """Ask the model about an order, through the gateway."""
        body = {
            "model": "orders",
            "messages": [{"role": "user", "content": order.prompt}],
            "metadata": {"task": "orders"},
        }
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            said = await answer.json()
            if answer.status not in (200, 423):
                raise RuntimeError(f"{answer.status}: {said}")
            self.sent[answer.headers["x-holdgate-decision"]] = order
        is_right = answer.status == 200 and order.is_right(said["choices"][0]["message"]["content"])
        tally.add(answer.status == 200, is_right)

    async def review(self, task: dict[str, Any]) -> None:
        """Look at an answer as a reviewer does, and approve or reject it by what is right."""
        shown = await self.get(f"/review/{task['id']}")
        order = self.sent[shown["decision_id"]]
        verdict = "approve" if order.is_right(shown["passages"][0]["text"]) else "reject"
        url = f"{self.url}/review/{task['id']}/submit"
        async with self.http.post(url, json={"verdict": verdict}) as done:
            done.raise_for_status()

    async def get(self, path: str) -> Any:
        """What the gateway says of itself or of a task."""
        async with self.http.get(self.url + path) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def until(self, holds: Callable[[Any], bool]) -> Any:
        """What `/readyz` says once that holds; RuntimeError if it does not within half a minute."""
        ends = time.monotonic() + _WAIT_S
        while not holds(ready := await self.get("/readyz")):
            if time.monotonic() > ends:
                raise RuntimeError(f"the gateway did not get there: {ready}")
            await asyncio.sleep(0.2)
        return ready


class Demo:
    """One run, in a folder of its own."""

    def __init__(self, folder: Path, url: str, out: Console, seed: int) -> None:
        self._folder, self._url, self._out = folder, url, out
        draws = random.Random(seed)
        self._plain, self._noisy = orders("plain"), orders("noisy")
        draws.shuffle(self._plain)
        draws.shuffle(self._noisy)
        self._progress = Progress(console=out)

    async def run(self) -> bool:
        """Go through it all; whether promise and alarm held."""
        connector = aiohttp.TCPConnector(limit=_AT_ONCE)
        async with aiohttp.ClientSession(connector=connector) as http:
            app = Application(self._url, http)
            await self._observe(app)
            self._fit()
            await self._enforce(app)
            with self._bars():
                enforced = await self._traffic(app, "enforce", self._plain[_OBSERVED:][:_ENFORCED])
                await self._review(app)
            kept = self._tell(enforced)
            alarmed = await self._drift(app)
            self._holdgate("status")
            return kept and alarmed

    @contextmanager
    def _bars(self) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=self._out) as self._progress:
            yield

    def _say(self, text: str) -> None:
        self._out.print(f"\n{text}", highlight=False, soft_wrap=True)

    async def _observe(self, app: Application) -> None:
        self._say(
            "[b]Observe.[/b] Nothing is known of the model's confidence yet: everything goes out and is reviewed."
        )
        with self._bars():
            tally = await self._traffic(app, "observe", self._plain[:_OBSERVED])
            await self._review(app)
        self._say(
            f"Of {tally.sent} answers {tally.errors} were wrong ({tally.error_rate:.1%}), and went out."
        )

    async def _traffic(self, app: Application, name: str, some: Sequence[Order]) -> Tally:
        tally = Tally()
        await self._each(name, some, lambda order: app.send(order, tally))
        return tally

    async def _each(
        self, name: str, items: Sequence[Any], act: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Act on every item, a few at once, with a progress bar."""
        bar = self._progress.add_task(f"{name:8}", total=len(items))
        todo = iter(items)

        async def work() -> None:
            for item in todo:
                await act(item)
                self._progress.advance(bar)

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work())

    async def _review(self, app: Application) -> None:
        """Review whatever waits, until nothing does."""
        bar = self._progress.add_task("review  ", total=None)
        while tasks := (await app.get(f"/review/queue?limit={_QUEUE}"))["data"]:
            async with asyncio.TaskGroup() as group:
                for some in _dealt(tasks, _AT_ONCE):
                    group.create_task(
                        self._reviewer(app, some, lambda: self._progress.advance(bar))
                    )
        (done,) = (task.completed for task in self._progress.tasks if task.id == bar)
        self._progress.update(bar, total=done)

    async def _reviewer(
        self, app: Application, tasks: Iterable[dict[str, Any]], advance: Callable[[], None]
    ) -> None:
        for task in tasks:
            await app.review(task)
            advance()

    def _fit(self) -> None:
        given = (
            "--policy",
            "orders",
            "--from-reviews",
            "--alpha",
            str(_ALPHA),
            "--delta",
            str(_DELTA),
        )
        self._holdgate("calibrate", "fit", *given, "--out", "orders-1.json")
        self._holdgate("calibrate", "apply", "orders-1.json", "--policy", "orders", "--yes")

    async def _enforce(self, app: Application) -> None:
        path = self._folder / "policies" / "orders.yaml"
        path.write_text(path.read_text("utf-8").replace("mode: observe", "mode: enforce"), "utf-8")
        (policy,) = load(path.parent, self._folder / "calibrators").policies.policies
        self._say("[b]Enforce.[/b] The gateway takes the policy up without a restart.")
        await app.until(lambda ready: ready["policies"] == [policy.label])

    def _holdgate(self, *arguments: str) -> None:
        self._say(f"[b]$ holdgate {' '.join(arguments)}[/b]")
        self._out.file.flush()
        command = (sys.executable, "-m", "gateway.cli", *arguments)
        width = {"COLUMNS": str(self._out.width)}
        done = subprocess.run(command, cwd=self._folder, env=os.environ | width, check=False)
        if done.returncode:
            raise RuntimeError(f"holdgate {' '.join(arguments)} exited {done.returncode}")

    def _tell(self, enforced: Tally) -> bool:
        text = (self._folder / "orders-1.json").read_text("utf-8")
        (promised,) = load_calibrator(text, file="orders-1.json").certificates
        table = Table("", "promised", "happened", title=f"The next {enforced.sent} orders")
        table.add_row(
            "errors among returned",
            f"at most {promised.alpha:.1%}, with probability {1 - promised.delta:.0%}",
            f"{enforced.error_rate:.2%} ({enforced.errors} of {enforced.returned})",
        )
        shares = [f"{n / enforced.sent:.1%} ({n})" for n in (enforced.returned, enforced.held)]
        table.add_row("returned on their own", f"{promised.coverage:.1%}", shares[0])
        table.add_row("held for a person", f"{1 - promised.coverage:.1%}", shares[1])
        self._out.print(table)
        # A share of at most alpha gives a sample with more now and then.
        kept = not contradicted(promised.alpha, enforced.returned, enforced.errors, _CHANCE)
        if enforced.error_rate > promised.alpha:
            said = "as chance would have it" if kept else "the promise is broken"
            self._say(f"More than {promised.alpha:.1%}: {said}.")
        return kept

    async def _drift(self, app: Application) -> bool:
        """Harder orders, until the alarm and a little longer."""
        self._say(
            "[b]Drift.[/b] The orders become harder to read, and nobody has told the gateway."
        )
        early = (await app.get("/readyz"))["alarms"]
        if early:
            self._say(f"An alarm was raised before anything changed: {early[0]['message']}")
        before, after = Tally(), Tally()
        with self._bars():
            alarms = await self._until_after_alarm(app, before, after)
        self._out.print(self._drift_table(before, after))
        for each in alarms[:3]:
            self._say(f"Alarm {each['kind']}: {each['message']}")
        if not alarms:
            self._say(f"[red]No alarm within {before.sent} orders.[/red]")
        return bool(alarms) and not early

    async def _until_after_alarm(self, app: Application, before: Tally, after: Tally) -> list[Any]:
        bar = self._progress.add_task("noisy   ", total=None)
        alarms: list[Any] = []
        for start in range(0, len(self._noisy), _BATCH):
            began = time.monotonic()
            for order in self._noisy[start : start + _BATCH]:
                await app.send(order, after if alarms else before)
                self._progress.advance(bar)
            await asyncio.sleep(max(began + _BATCH_S - time.monotonic(), 0.0))
            if not alarms and (alarms := (await app.get("/readyz"))["alarms"]):
                # Every replica knows within two seconds, a busy one a little later; the tallies are to be clean.
                await asyncio.sleep(5.0)
            if after.sent >= _AFTER_ALARM:
                break
        self._progress.update(bar, total=before.sent + after.sent)
        return alarms

    def _drift_table(self, before: Tally, after: Tally) -> Table:
        table = Table("noisy orders", "sent", "returned", "errors among returned", "held")
        for name, tally in (("until the alarm", before), ("after it", after)):
            errors = f"{tally.error_rate:.1%} ({tally.errors})" if tally.returned else "–"
            table.add_row(name, str(tally.sent), str(tally.returned), errors, str(tally.held))
        return table


def _dealt(items: Sequence[Any], hands: int) -> list[Sequence[Any]]:
    return [items[start::hands] for start in range(hands)]


def learn(results: Path, seed: int) -> int:
    """Run the demo and copy artefact and report into `results`; the exit code: 1 if promise or alarm did not hold."""
    out, began = Console(), time.monotonic()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _WIDTH_CHARS
    with tempfile.TemporaryDirectory(prefix="holdgate-demo-") as name, ExitStack() as stack:
        folder = Path(name)
        # Its matrices are far too small to be worth a second thread.
        upstream = stack.enter_context(
            server(folder, "demo-upstream", "--port", "0", OPENBLAS_NUM_THREADS="1")
        )
        _write_config(folder, upstream)
        url = stack.enter_context(server(folder, "serve"))
        out.print(
            f"A small language model answers on {upstream}; Holdgate stands before it on {url}.\n"
        )
        kept = asyncio.run(Demo(folder, url, out, seed).run())
        results.mkdir(parents=True, exist_ok=True)
        for each in ("orders-1.json", "orders-1.html"):
            shutil.copy(folder / each, results / each)
    took_s = time.monotonic() - began
    out.print(
        f"\nThe report is {results / 'orders-1.html'}. It all took {took_s:.0f} s.", highlight=False
    )
    return 0 if kept else 1


def _write_config(folder: Path, upstream: str) -> None:
    (folder / "policies").mkdir()
    (folder / "policies" / "orders.yaml").write_text(_POLICY, "utf-8")
    settings = {
        "listen": {"port": 0},
        "policies": "policies/",
        "calibrators": "calibrators/",
        "store": {"url": f"sqlite:///{folder}/holdgate.db"},
        "models": [{"match": "*", "base_url": f"{upstream}/v1"}],
        "log": {"level": "error"},
    }
    # JSON is YAML.
    (folder / "holdgate.yaml").write_text(json.dumps(settings), "utf-8")
