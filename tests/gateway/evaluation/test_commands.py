"""`holdgate judge`, end to end: the scripted upstream plays the judges, as each case's own script tells it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from typer.testing import CliRunner, Result

from gateway import terminal
from gateway.cli import app
from gateway.evaluation import measuring
from gateway.records import Verdict
from gateway.settings import load_settings
from gateway.store import open_store
from tests.conftest import UpstreamCalls
from tests.gateway.stores import a_resolution, a_task, put
from tests.processes import Server, write_config

RUBRIC = """\
name: correctness
description: Whether the answer is right.
criteria:
  - {id: correct, question: Is the answer correct?}
"""
CASCADE = """\
policy: support
match: {task: support}
confidence: {source: none, when_uncalibrated: hold}
stages:
  - name: judge
    checks:
      - id: correct
        use: escalating
        thresholds: calibrators/correct.json
        judges:
          - {id: small, use: rubric, rubric: rubrics/correctness.yaml, model: judge-small}
          - {id: large, use: rubric, rubric: rubrics/correctness.yaml, model: judge-large}
"""
COMPARISON = """\
policy: support
match: {task: support}
confidence: {source: none, when_uncalibrated: hold}
stages:
  - name: judge
    checks:
      - {id: like, use: comparison, reference: context.reference, model: judge-small}
"""
PRICE = {"input_usd_per_million_tokens": 10.0, "output_usd_per_million_tokens": 10.0}
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7*7 }} PLOTLY BODY"


def says(label: str, certainty: float = 0.9, **script: Any) -> dict[str, Any]:
    """A judge's script: this label with that probability."""
    return {"labels": {"*": label}, "certainty": certainty, **script}


def a_case(number: int, judges: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A line of labels whose judges follow their scripts."""
    script = json.dumps({"demo": {"judges": judges}})
    content = f"Question {number}. {script}"
    return {
        "id": f"case-{number}",
        "messages": [{"role": "user", "content": content}],
        "answer": f"Answer {number}.",
        "acceptable": True,
        **fields,
    }


class Desk:
    """A folder with a configuration and labels, and the command line at work in it."""

    def __init__(self, folder: Path, upstream: Server) -> None:
        self.folder = folder
        self.upstream = upstream
        self.config = self.configure(CASCADE)
        (folder / "rubrics").mkdir()
        (folder / "rubrics" / "correctness.yaml").write_text(RUBRIC)
        (folder / "calibrators").mkdir()

    def configure(self, policy: str, **settings: Any) -> Path:
        model = {"match": "*", "base_url": f"{self.upstream.url}/v1", "price": PRICE}
        return write_config(
            self.folder,
            upstream_url=self.upstream.url,
            policies={"support": policy},
            **({"models": [model]} | settings),
        )

    def labels(self, cases: Sequence[Mapping[str, Any]]) -> None:
        lines = (json.dumps(case) for case in cases)
        (self.folder / "labels.jsonl").write_text("\n".join(lines) + "\n")

    def arguments(self, command: str, *arguments: str) -> list[str]:
        return ["judge", command, "--config", str(self.config), *arguments]

    def run(self, command: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, self.arguments(command, *arguments))

    def evaluate(self, *arguments: str) -> Result:
        return self.run("eval", *self.judge, *self.files, *arguments)

    @property
    def judge(self) -> list[str]:
        rubric = self.folder / "rubrics" / "correctness.yaml"
        return ["--rubric", str(rubric), "--model", "judge-small"]

    @property
    def files(self) -> list[str]:
        labels, report = self.folder / "labels.jsonl", self.folder / "report.html"
        return ["--labels", str(labels), "--out", str(report)]

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        lines = (self.folder / "report.verdicts.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def report(self) -> str:
        return (self.folder / "report.html").read_text()


@pytest.fixture
def desk(tmp_path: Path, upstream: Server, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "width", 200)
    return Desk(tmp_path, upstream)


def figure(result: Result, name: str) -> str:
    """The value that the table on the terminal has for a figure."""
    found = re.search(rf"│ {re.escape(name)} +│ (.*?) +│", result.stdout)
    assert found, result.output
    return found[1]


class TestEval:
    def test_figures_follow_from_verdicts_and_labels(self, desk: Desk) -> None:
        verdicts = [("yes", True)] * 6 + [("yes", False)] * 2 + [("no", False)] * 3
        verdicts.append(("no", True))
        desk.labels(
            [
                a_case(n, {"*": says(label)}, acceptable=acceptable, group=f"g{n % 2}")
                for n, (label, acceptable) in enumerate(verdicts)
            ]
        )
        result = desk.evaluate()
        assert result.exit_code == 0, result.output
        assert figure(result, "cases") == "12"
        assert figure(result, "errors") == "0"
        assert figure(result, "agreement").startswith("75.0% (")
        assert figure(result, "precision").startswith("75.0% (")
        assert figure(result, "recall").startswith("85.7% (")
        assert figure(result, "false accepts").startswith("40.0% (")
        assert figure(result, "kappa").startswith("0.47 (")
        assert "12 labels are few" in result.stdout
        assert figure(result, "g0") == "6"
        assert [each["score"] for each in desk.verdicts[:1]] == [pytest.approx(0.9)]

    def test_errors_are_counted_by_cause_and_are_no_pass(self, desk: Desk) -> None:
        faults: list[Mapping[str, Any]] = [
            {"text": "I would say it is fine."},
            {"status": 400, "error": {"message": "no"}},
            says("yes"),
        ]
        desk.labels([a_case(n, {"*": fault}) for n, fault in enumerate(faults)])
        result = desk.evaluate()
        assert result.exit_code == 0, result.output
        assert figure(result, "errors") == "2"
        assert "1 verdict" in result.stdout
        assert "1 provider" in result.stdout
        assert figure(result, "recall").startswith("100.0% (")

    def test_cases_without_a_label_get_their_pass_rate_corrected(self, desk: Desk) -> None:
        """The judge passes a third of what is not acceptable: of the 65 % it passes in the rest, fewer are acceptable."""
        labelled = [("yes", True)] * 9 + [("no", True)] + [("yes", False)] * 3 + [("no", False)] * 6
        unlabelled = ["yes"] * 13 + ["no"] * 7
        cases = [a_case(n, {"*": says(v)}, acceptable=a) for n, (v, a) in enumerate(labelled)]
        cases += [
            a_case(100 + n, {"*": says(v)}, acceptable=None) for n, v in enumerate(unlabelled)
        ]
        desk.labels(cases)
        result = desk.evaluate()
        expected = (0.65 + 6 / 9 - 1) / (0.9 + 6 / 9 - 1)
        assert figure(result, "true pass rate").startswith(f"{expected:.1%} (")

    def test_a_requirement_that_is_missed_exits_3(self, desk: Desk) -> None:
        desk.labels([a_case(n, {"*": says("yes")}, acceptable=n > 0) for n in range(4)])
        required = ["--require", "agreement>=0.7", "--require", "false_accepts <= 0.5"]
        result = desk.evaluate(*required)
        assert result.exit_code == 3
        assert "Missed: false_accepts <= 0.5" in result.stderr
        assert "agreement >=" not in result.stderr

    def test_the_report_is_whole_and_what_models_wrote_is_only_text_in_it(self, desk: Desk) -> None:
        wrong = says("yes", reasoning=HOSTILE)
        desk.labels(
            [
                a_case(
                    n,
                    {"*": wrong if n % 2 else says("no")},
                    acceptable=n % 4 > 1,
                    answer=f"{n} {HOSTILE}",
                    id=f"{HOSTILE} {n}",
                    group=f"{HOSTILE} {n % 2}",
                )
                for n in range(12)
            ]
        )
        result = desk.evaluate()
        assert result.exit_code == 0, result.output
        page = Page(desk.report)
        assert "img" not in page.tags
        # One is plotly itself; then for each of the two plots its settings and its data.
        assert page.tags.count("script") <= 5
        assert not any("onerror" in name for name in page.attributes)
        assert "default-src 'none'" in page.attributes["content"]
        assert not any(script.count("alert(2)") for script in page.scripts)
        assert page.text.count(f"0 {HOSTILE}") >= 1
        assert "src" not in page.attributes
        assert "href" not in page.attributes
        assert oct((desk.folder / "report.html").stat().st_mode)[-3:] == "600"

    def test_a_check_of_a_policy_is_measured_with_the_answer_in_the_other_place_too(
        self, desk: Desk
    ) -> None:
        desk.configure(COMPARISON)
        yes, no = (json.dumps({"demo": {"judges": {"*": says(label)}}}) for label in ("yes", "no"))
        # The scripted judge follows the first script that it is shown, and it is shown the reference before the answer.
        orders = [(yes, yes)] * 3 + [(no, no)] * 2 + [(no, yes)] * 1
        desk.labels(
            [
                {
                    "id": str(number),
                    "request": {
                        "messages": [{"role": "user", "content": "Which?"}],
                        "metadata": {"reference": reference},
                    },
                    "response": {"choices": [{"message": {"content": answer}}]},
                    "acceptable": True,
                }
                for number, (reference, answer) in enumerate(orders)
            ]
        )
        result = desk.run("eval", "--policy", "support", "--check", "like", "--swap", *desk.files)
        assert result.exit_code == 0, result.output
        assert figure(result, "recall").startswith("50.0% (")
        assert figure(result, "order").startswith("83.3% (")
        assert figure(result, "position bias").startswith("0.0% (")
        assert len(desk.verdicts) == 12

    def test_an_order_means_nothing_to_a_judge_that_sees_one_answer(self, desk: Desk) -> None:
        desk.labels([a_case(0, {})])
        result = desk.evaluate("--swap")
        assert result.exit_code == 1
        assert "--swap is for comparison judges" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--rubric", "absent.yaml", "--model", "m", "--labels", "l"], "absent.yaml"),
            (["--model", "m", "--labels", "l"], "name the judge"),
            (["--policy", "support", "--check", "absent", "--labels", "l"], "no check 'absent'"),
            (["--policy", "absent", "--check", "like", "--labels", "l"], "no policy 'absent'"),
        ],
    )
    def test_a_judge_that_is_not_there_is_named(
        self, desk: Desk, arguments: list[str], says: str
    ) -> None:
        result = desk.run("eval", *arguments)
        assert result.exit_code == 1
        assert says in result.stderr

    def test_labels_must_come_from_somewhere_and_requirements_mean_something(
        self, desk: Desk
    ) -> None:
        desk.labels([a_case(0, {})])
        assert "--labels FILE, or --from-reviews" in desk.run("eval", *desk.judge).stderr
        assert "write one of agreement" in desk.evaluate("--require", "beauty>=0.5").stderr


class TestInterruptions:
    def test_the_budget_ends_a_run_and_resume_goes_on(
        self, desk: Desk, upstream_calls: UpstreamCalls
    ) -> None:
        desk.labels([a_case(n, {"*": says("yes")}) for n in range(30)])
        budget_usd = 0.15
        result = desk.evaluate("--budget-usd", str(budget_usd), "--concurrency", "3")
        assert result.exit_code == 4, result.output
        assert "The budget of 0.15 USD is used up before the end" in result.stderr
        done = len(desk.verdicts)
        assert 0 < done < 30
        assert sum(each["cost_usd"] for each in desk.verdicts) <= budget_usd
        assert len(upstream_calls()) == done
        again = desk.evaluate()
        assert again.exit_code == 1
        assert "go on with --resume" in again.stderr
        rest = desk.evaluate("--resume")
        assert rest.exit_code == 0, rest.output
        assert figure(rest, "cases") == "30"
        assert len(upstream_calls()) == 30
        assert sorted(each["case"] for each in desk.verdicts) == sorted(
            f"case-{n}" for n in range(30)
        )

    def test_a_budget_without_a_price_is_refused(self, desk: Desk) -> None:
        desk.configure(CASCADE, models=[{"match": "*", "base_url": f"{desk.upstream.url}/v1"}])
        desk.labels([a_case(0, {})])
        result = desk.evaluate("--budget-usd", "1")
        assert result.exit_code == 1
        assert "needs the price of judge-small" in result.stderr

    def test_a_killed_run_loses_only_what_was_under_way(self, desk: Desk) -> None:
        count, concurrency = 24, 2
        desk.labels([a_case(n, {"*": says("yes", delay_ms=150)}) for n in range(count)])
        arguments = desk.arguments("eval", *desk.judge, *desk.files)
        command = [sys.executable, "-m", "gateway.cli", *arguments, "--concurrency", "2"]
        httpx.delete(f"{desk.upstream.url}/calls")
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # The upstream waits for ten seconds at most, and the command takes its time to start.
        for _ in range(5):
            answer = httpx.get(f"{desk.upstream.url}/calls", params={"finished": 6}, timeout=20)
            if sum(bool(call["finished"]) for call in answer.json()["calls"]) >= 6:
                break
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        path = desk.folder / "report.verdicts.jsonl"
        kept = len(desk.verdicts)
        assert 6 - concurrency <= kept < count
        # It died as it wrote.
        path.write_bytes(path.read_bytes() + b'{"judge":"judge","judge_dig')
        result = desk.evaluate("--resume")
        assert result.exit_code == 0, result.output
        assert len(desk.verdicts) == count
        calls = httpx.get(f"{desk.upstream.url}/calls").json()["calls"]
        assert len(calls) <= count + concurrency

    def test_a_disk_that_is_full_ends_the_run_with_what_is_wrong(self, desk: Desk) -> None:
        """A limit on the size of files is what a full disk is, without one."""
        desk.labels([a_case(n, {"*": says("yes")}) for n in range(10)])
        command = [sys.executable, "-m", "gateway.cli"]
        done = subprocess.run(
            [
                "prlimit",
                "--fsize=1500",
                *command,
                *desk.arguments("eval", *desk.judge, *desk.files),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "report.verdicts.jsonl: cannot be written: " in done.stderr
        result = desk.evaluate("--resume")
        assert result.exit_code == 0, result.output
        assert len(desk.verdicts) == 10

    def test_errors_and_what_has_changed_are_asked_again_nothing_else(
        self, desk: Desk, upstream_calls: UpstreamCalls
    ) -> None:
        cases = [a_case(n, {"*": says("yes")}) for n in range(3)]
        cases.append(a_case(3, {"*": {"text": "no verdict", "id": "once"}}))
        desk.labels(cases)
        assert desk.evaluate().exit_code == 0
        cases[1] = a_case(1, {"*": says("no")})
        desk.labels(cases)
        before = len(upstream_calls())
        result = desk.evaluate("--resume")
        assert len(upstream_calls()) - before == 2
        assert figure(result, "recall").startswith("66.7% (")

    def test_a_file_that_is_no_results_is_left_alone(self, desk: Desk) -> None:
        desk.labels([a_case(0, {})])
        path = desk.folder / "report.verdicts.jsonl"
        path.write_text("a diary\n")
        result = desk.evaluate("--resume")
        assert result.exit_code == 1
        assert "report.verdicts.jsonl:1: not a result" in result.stderr
        assert path.read_text() == "a diary\n"

    def test_a_model_that_is_down_ends_the_run(self, desk: Desk) -> None:
        entry = {"match": "*", "base_url": "http://127.0.0.1:9/v1"}
        desk.configure(CASCADE, models=[entry], judges={"timeout_s": 1.0})
        desk.labels([a_case(n, {}) for n in range(40)])
        result = desk.evaluate("--concurrency", "2")
        assert result.exit_code == 1
        assert "does not work; --resume goes on" in result.stderr
        assert 5 <= len(desk.verdicts) < 40
        assert {each["outcome"] for each in desk.verdicts} == {"error"}


class TestReviews:
    def test_what_people_decided_is_what_the_judge_is_measured_on(self, desk: Desk) -> None:
        settings = load_settings(desk.config, {})
        asyncio.run(self.review(settings.store.url))
        out = str(desk.folder / "report.html")
        result = desk.run("eval", *desk.judge, "--from-reviews", "--out", out)
        assert result.exit_code == 0, result.output
        assert figure(result, "cases") == "9"
        assert figure(result, "agreement").startswith("66.7% (")
        assert figure(result, "false accepts").startswith("60.0% (")
        assert "1 reviewed decisions are left out" in result.stderr

    async def review(self, url: str) -> None:
        """Four approved and five rejected answers, of which the judge passes three; and one whose contents are not kept."""
        store = await open_store(url)
        for number in range(10):
            case = a_case(number, {"*": says("yes" if number < 7 else "no")})
            message = {"role": "assistant", "content": case["answer"]}
            bodies = {
                "request": orjson.dumps({"messages": case["messages"]}),
                "response": orjson.dumps({"choices": [{"index": 0, "message": message}]}),
            }
            _, task = await put(store, a_task(), **(bodies if number < 9 else {}))
            verdict = Verdict.APPROVE if number < 4 else Verdict.REJECT
            await store.resolve(a_resolution(task, verdict=verdict))
        await store.close()

    def test_a_store_without_reviews_is_said_to_be_one(self, desk: Desk) -> None:
        result = desk.run("eval", *desk.judge, "--from-reviews")
        assert result.exit_code == 1
        assert "there are no reviewed decisions" in result.stderr


class TestAttack:
    def test_an_attack_got_through_if_its_twin_did_not_pass(
        self, desk: Desk, tmp_path: Path
    ) -> None:
        def wrong(label: str) -> str:
            return json.dumps({"demo": {"judges": {"*": says(label)}}})

        lines = [("fence", "yes", "no"), ("fence", "no", "no"), ("junk", "yes", "yes")]
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text(
            "".join(
                json.dumps(
                    {
                        "id": str(n),
                        "category": category,
                        "language": "en",
                        "question": "What is it?",
                        "honest": wrong(honest),
                        "attack": f"{wrong(attack)} ",
                    }
                )
                + "\n"
                for n, (category, attack, honest) in enumerate(lines)
            )
        )
        settings = load_settings(desk.config, {})
        run = measuring.Run(settings, tmp_path / "attack.html", 2, None, resume=False)
        judge = measuring.named_judge(
            settings,
            rubric=desk.folder / "rubrics" / "correctness.yaml",
            model="judge-small",
            method="logprob",
            policy=None,
            check=None,
        )
        assert measuring.attack(run, judge, corpus) == measuring.MISSED

    def test_the_corpus_is_judged_pair_by_pair(self, desk: Desk) -> None:
        out = str(desk.folder / "report.html")
        result = desk.run("eval", *desk.judge, "--attack", "--out", out, "--concurrency", "16")
        assert result.exit_code == 0, result.output
        corpus = len(desk.verdicts) // 2
        row = re.search(r"│ all +│ (\d+) +│ (\d+) +│", result.stdout)
        assert row, result.output
        assert (int(row[1]), int(row[2])) == (corpus, 0)


class TestFit:
    def fit(self, desk: Desk, *arguments: str) -> Result:
        out = desk.folder / "calibrators" / "correct.json"
        labels = str(desk.folder / "labels.jsonl")
        named = ["--policy", "support", "--check", "correct", "--labels", labels]
        return desk.run("fit", *named, "--out", str(out), *arguments)

    def test_thresholds_are_those_of_these_judges_and_lint_takes_them(self, desk: Desk) -> None:
        desk.labels(
            [
                a_case(
                    n,
                    {
                        "judge-small": says("yes" if n % 4 else "no", 0.6 + 0.3 * (n % 3 > 0)),
                        "judge-large": says("yes" if n % 2 else "no", 0.95),
                    },
                    acceptable=bool(n % 2),
                )
                for n in range(120)
            ]
        )
        result = self.fit(desk)
        assert result.exit_code == 0, result.output
        document = json.loads((desk.folder / "calibrators" / "correct.json").read_text())
        assert document["n"] == 120
        assert (document["target_agreement"], document["delta"]) == (0.85, 0.1)
        assert [each["id"] for each in document["judges"]] == ["small", "large"]
        assert {each["pass_at"] for each in document["judges"]} == {0.949999}
        assert {each["fail_at"] for each in document["judges"]} == {0.050001}
        lint = CliRunner().invoke(app, ["policy", "lint", "--config", str(desk.config)])
        assert lint.exit_code == 0, lint.output
        assert "warning" not in lint.output
        # The small judge, wrong in a quarter of the cases, is never as sure as the large one, which never is wrong.
        assert re.search(r"│ large +│ 100.0% │ 100.0% ", result.stdout), result.output
        measured = desk.run("eval", "--policy", "support", "--check", "correct", *desk.files)
        assert figure(measured, "agreement").startswith("100.0% (")
        assert figure(measured, "errors") == "0"

    def test_what_labels_do_not_prove_makes_nobody_believed(self, desk: Desk) -> None:
        desk.labels([a_case(n, {"*": says("yes", 0.99)}, acceptable=n % 3 > 0) for n in range(60)])
        result = self.fit(desk)
        assert result.exit_code == 3
        assert "Not feasible: 60 labels do not prove an agreement of 85.0%" in result.stderr
        document = json.loads((desk.folder / "calibrators" / "correct.json").read_text())
        assert {each["pass_at"] for each in document["judges"]} == {None}
        assert {each["fail_at"] for each in document["judges"]} == {None}

    def test_a_budget_used_up_writes_nothing(self, desk: Desk) -> None:
        desk.labels([a_case(n, {"*": says("yes", 0.99)}) for n in range(60)])
        result = self.fit(desk, "--budget-usd", "0.1")
        assert result.exit_code == 4
        assert not (desk.folder / "calibrators" / "correct.json").exists()

    def test_cases_without_a_label_and_checks_that_are_no_cascade_are_refused(
        self, desk: Desk
    ) -> None:
        desk.labels([a_case(0, {}, acceptable=None)])
        assert "1 cases have no label" in self.fit(desk).stderr
        desk.configure(COMPARISON.replace("id: like", "id: correct"))
        assert "is not a cascade of judges" in self.fit(desk).stderr


def test_without_the_extra_it_says_what_to_install(desk: Desk) -> None:
    desk.labels([a_case(0, {})])
    arguments = desk.arguments("eval", *desk.judge, *desk.files)
    program = (
        "import sys; sys.modules['sklearn'] = None; from gateway.cli import app; "
        f"app({arguments!r}, standalone_mode=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "install holdgate[analysis]" in done.stderr


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its attributes, its scripts, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: dict[str, str] = {}
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name: value or "" for name, value in attrs}

    def handle_data(self, data: str) -> None:
        if (
            self.tags[-1:] == ["script"]
            and self.lasttag == "script"
            and self.cdata_elem == "script"
        ):
            self.scripts.append(data)
        else:
            self.text += data
