"""`holdgate calibrate`, end to end: labels of known truth in, artefacts, reports and policies out."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway import terminal
from gateway.calibrating.fitting import Comparison
from gateway.records import Verdict
from gateway.store import open_store
from policies import Calibrator, RiskTier, load_calibrator
from policies.calibration import Certificate
from tests.gateway.calibrating.desk import POLICY, Desk, some_labels
from tests.gateway.evaluation.test_commands import HOSTILE, Page
from tests.gateway.stores import a_decision, a_resolution, a_task, later, put


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "width", 200)
    return Desk(tmp_path)


@pytest.fixture
def fitted(desk: Desk) -> Desk:
    """A desk with an artefact of alpha 10 % that is feasible."""
    desk.labels(some_labels(800, seed=1))
    assert desk.fit("orders-1.json", "--alpha", "0.1").exit_code == 0
    return desk


def artefact(desk: Desk, name: str = "orders-1.json") -> Calibrator:
    return load_calibrator((desk.folder / name).read_text(), file=name)


class TestFit:
    def test_what_is_promised_is_printed_written_and_reported(self, desk: Desk) -> None:
        desk.labels(some_labels(800, seed=1))
        result = desk.fit("orders-1.json", "--alpha", "0.1", "--delta", "0.1")
        assert result.exit_code == 0, result.output
        calibrator = artefact(desk)
        (certificate,) = calibrator.certificates
        assert (calibrator.name, calibrator.model, calibrator.n) == ("orders-1", "m", 800)
        assert (certificate.alpha, certificate.delta) == (0.1, 0.1)
        assert certificate.threshold is not None
        assert "certified: at most 10 % errors among" in result.stdout
        assert f"{certificate.threshold:.4f}" in (desk.folder / "orders-1.html").read_text()

    def test_what_cannot_be_certified_is_said_to_be_so_and_exits_3(self, desk: Desk) -> None:
        desk.labels(some_labels(300, seed=2, chance=lambda p: min(p, 0.95)))
        result = desk.fit("orders-1.json", "--alpha", "0.02")
        assert result.exit_code == 3
        said = r"Not feasible: cannot certify 2 % with \d+ labels: at best \d+(\.\d)? %"
        assert re.search(said, result.stderr)
        (certificate,) = artefact(desk).certificates
        assert certificate.threshold is None

    def test_how_many_more_labels_would_do_is_said_where_labels_are_what_is_missing(
        self, desk: Desk
    ) -> None:
        desk.labels(some_labels(120, seed=3, chance=lambda p: 0.999 if p > 0.7 else 0.3))
        result = desk.fit("orders-1.json", "--alpha", "0.02")
        assert result.exit_code == 3
        assert re.search(r"; about \d+ more labels needed", result.stderr)

    def test_the_cheapest_threshold_stands_beside(self, desk: Desk) -> None:
        desk.labels(some_labels(400, seed=1))
        cost = ("--cost-error", "50", "--cost-review", "1.2", "--mode", "estimated")
        result = desk.fit("orders-1.json", "--alpha", "0.1", *cost)
        assert result.exit_code == 0, result.output
        assert artefact(desk).cost_threshold == pytest.approx(1 - 1.2 / 50)
        assert "0.9760" in result.stdout
        assert "estimated, not proven" in result.stdout

    def test_a_threshold_for_each_tier(self, desk: Desk) -> None:
        low = some_labels(600, seed=1, prefix="l", tier="low")
        high = some_labels(600, seed=2, prefix="h", tier="high")
        desk.labels([*low, *high])
        assert desk.fit("orders-1.json", "--alpha", "0.1", "--per", "tier").exit_code == 0
        tiers = {each.tier for each in artefact(desk).certificates}
        assert tiers == {RiskTier.LOW, RiskTier.HIGH}

    def test_a_tier_may_have_a_share_of_errors_of_its_own(self, desk: Desk) -> None:
        low = some_labels(600, seed=1, prefix="l", tier="low")
        high = some_labels(600, seed=2, prefix="h", tier="high")
        desk.labels([*low, *high])
        desk.fit("orders-1.json", "--alpha", "0.05, low=0.2", "--per", "tier")
        alphas = {each.tier: each.alpha for each in artefact(desk).certificates}
        assert alphas == {RiskTier.LOW: 0.2, RiskTier.HIGH: 0.05}

    @pytest.mark.parametrize(
        ("alpha", "per", "says"),
        [
            ("low", "tier", "'low' is not a share"),
            ("low=0.9", "tier", "'0.9' is not a share"),
            ("low=nan", "tier", "'nan' is not a share"),
            ("0.1,0.2", "tier", "say each tier or task once"),
            ("low=0.1,low=0.2", "tier", "say each tier or task once"),
            ("=0.1", "tier", "say each tier or task once"),
            ("low=0.1", "all", "say --per tier or --per task"),
            ("lwo=0.1", "tier", "no tier 'lwo'; there are low, medium, high, critical"),
            ("low=0.1", "tier", "alpha is said of low, and not of tier medium"),
            ("0.1,low=0.2", "tier", "alpha is said of tier low, of which there is no label"),
            ("refunds=0.1", "task", "alpha is said of refunds, and not of task orders"),
        ],
    )
    def test_a_share_that_cannot_be_is_told(
        self, desk: Desk, alpha: str, per: str, says: str
    ) -> None:
        desk.labels(some_labels(200, seed=1))
        result = desk.fit("orders-1.json", "--alpha", alpha, "--per", per)
        assert result.exit_code == 1
        assert says in " ".join(result.stderr.split())
        assert not (desk.folder / "orders-1.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--from-reviews",), "there are no labels"),
            (("--policy", "nothing"), "there is no policy 'nothing'; there are orders"),
            (("--model", "other"), "no signal is of use"),
        ],
    )
    def test_what_is_wrong_is_told_and_nothing_written(
        self, desk: Desk, arguments: tuple[str, ...], says: str
    ) -> None:
        desk.labels(some_labels(100, seed=1))
        result = desk.fit("orders-1.json", *arguments)
        assert result.exit_code == 1
        assert says in result.stderr
        assert not (desk.folder / "orders-1.json").exists()

    def test_the_file_names_the_calibrator(self, desk: Desk) -> None:
        desk.labels(some_labels(100, seed=1))
        result = desk.fit("Orders 1.json")
        assert result.exit_code == 1
        assert "the calibrator is called after its file" in result.stderr

    def test_labels_come_from_the_file_or_from_reviews(self, desk: Desk) -> None:
        result = desk.run("fit", "--policy", "orders", "--out", desk.path("a.json"))
        assert result.exit_code == 1
        assert "name the labels: --labels FILE, or --from-reviews" in result.stderr

    def test_reviews_are_labels_and_recent_traffic_is_compared_with_them(self, desk: Desk) -> None:
        asyncio.run(self.review(desk.store_url))
        result = desk.fit("orders-1.json", "--from-reviews", "--alpha", "0.1")
        assert result.exit_code == 0, result.output
        assert artefact(desk).n == 300
        assert "signal mean_logprob has drifted" in result.stderr

    async def review(self, url: str) -> None:
        """Three hundred reviewed responses, and as many after them, surer than those."""
        store = await open_store(url)
        for row in some_labels(300, seed=1):
            evidence = {"signals": row["signals"], "results": {}}
            detail: dict[str, Any] = {"evidence": evidence}
            digest = row["id"]
            _, task = await put(
                store, a_task(), policy="orders@1", detail=detail, request_digest=digest
            )
            verdict = Verdict.APPROVE if row["acceptable"] else Verdict.REJECT
            await store.resolve(a_resolution(task, verdict=verdict))
            later = {"evidence": {"signals": {"mean_logprob": -0.001, "n_tokens": 20.0}}}
            await store.record(a_decision(policy="orders@1", detail=later))
        await store.close()


class TestSecondOpinions:
    """Of 700 reviews by ann 4 of the surest answers are rejected by a slip."""

    async def review(self, url: str) -> None:
        store = await open_store(url)
        slips = 0
        for row in some_labels(700, seed=5, chance=lambda p: 1.0 if p > 0.75 else 0.3):
            is_slip = slips < 4 and row["signals"]["mean_logprob"] > -0.01
            slips += is_slip
            _, task = await put(
                store,
                a_task(),
                policy="orders@1",
                model="m",
                detail={"evidence": {"signals": row["signals"], "results": {}}},
                request_digest=row["id"],
                response=b"{}",
            )
            good = row["acceptable"] and not is_slip
            verdict = Verdict.APPROVE if good else Verdict.REJECT
            await store.resolve(a_resolution(task, verdict=verdict))
        await store.close()

    async def opine(self, url: str, who: str) -> int:
        """Approve every second opinion that is open to somebody; how many there were."""
        store = await open_store(url)
        found = await store.queue(later(1000), 200, who)
        for task in found:
            await store.resolve(a_resolution(task.id, reviewer=who, at=later(1000)))
        await store.close()
        return len(found)

    def test_slips_are_named_looked_at_by_others_and_overruled(self, desk: Desk) -> None:
        asyncio.run(self.review(desk.store_url))
        arguments = ("--from-reviews", "--alpha", "0.02", "--delta", "0.1")
        first = desk.fit("orders-1.json", *arguments)
        assert "labels contradict all the others where they stand" in first.stderr
        assert "--second-opinions asks other reviewers" in first.stderr
        assert asyncio.run(self.opine(desk.store_url, "bob")) == 0
        asked = desk.fit("orders-1.json", *arguments, "--second-opinions")
        assert "Second opinions: " in asked.stdout
        assert "0 were there already" in asked.stdout
        assert asyncio.run(self.opine(desk.store_url, "ann")) == 0
        opinions = asyncio.run(self.opine(desk.store_url, "bob"))
        assert 1 <= opinions <= 10
        # Two say one thing each: it is an error still, and a third is asked.
        assert desk.fit("orders-2.json", *arguments, "--second-opinions").exit_code == 3
        assert asyncio.run(self.opine(desk.store_url, "bob")) == 0
        assert asyncio.run(self.opine(desk.store_url, "cat")) >= opinions
        last = desk.fit("orders-3.json", *arguments)
        assert last.exit_code == 0, last.output
        before, after = (artefact(desk, f"orders-{n}.json").certificates[0] for n in (1, 3))
        assert before.threshold is None
        assert after.threshold is not None
        assert after.coverage > 0.5

    def test_they_are_asked_of_reviewers_and_not_of_a_file(self, desk: Desk) -> None:
        desk.labels(some_labels(300, seed=1))
        result = desk.fit("orders-1.json", "--second-opinions")
        assert result.exit_code == 1
        assert "--second-opinions asks reviewers again" in result.stderr


class TestReport:
    def test_a_report_needs_and_fetches_nothing_else(self, fitted: Desk) -> None:
        page = Page((fitted.folder / "orders-1.html").read_text())
        assert not page.attributes.keys() & {"src", "href"}
        for heading in ("Is the confidence true?", "What a threshold costs", "Worst mistakes"):
            assert heading in page.text

    def test_an_artefact_is_measured_on_other_labels(self, fitted: Desk) -> None:
        other = fitted.labels(some_labels(500, seed=9), "other.jsonl")
        out = fitted.path("report.html")
        result = fitted.run("report", fitted.path("orders-1.json"), "--labels", other, "--out", out)
        assert result.exit_code == 0, result.output
        assert "500" in result.stdout
        assert "it was fitted to these labels" not in Path(out).read_text()
        own = ("--labels", fitted.path("labels.jsonl"), "--out", out)
        assert fitted.run("report", fitted.path("orders-1.json"), *own).exit_code == 0
        assert "it was fitted to these labels" in Path(out).read_text()

    def test_slices_where_calibration_fails_are_named(self, desk: Desk) -> None:
        good = some_labels(600, seed=1)
        bad = some_labels(200, seed=2, prefix="b", chance=lambda p: p / 3, task="claims")
        desk.labels([*good, *bad])
        desk.fit("orders-1.json", "--alpha", "0.3")
        page = Page((desk.folder / "orders-1.html").read_text())
        assert re.search(r"Calibration fails in: .*task claims", page.text)

    def test_what_comes_from_outside_stays_text(self, desk: Desk) -> None:
        rows = some_labels(400, seed=1, prefix=HOSTILE)
        half = [row | {"task": HOSTILE} for row in rows[::2]]
        desk.labels([*half, *rows[1::2]])
        assert desk.fit("orders-1.json", "--alpha", "0.2", "--per", "task").exit_code in (0, 3)
        page = Page((desk.folder / "orders-1.html").read_text())
        assert "img" not in page.tags
        assert HOSTILE in page.text
        assert not any("alert(1)" in script for script in page.scripts)

    def test_a_calibrator_must_be_named(self, desk: Desk) -> None:
        desk.labels(some_labels(100, seed=1))
        result = desk.run("report", "--policy", "orders", "--labels", desk.path("labels.jsonl"))
        assert result.exit_code == 1
        assert "name the calibrator" in result.stderr


class TestApply:
    def apply(self, desk: Desk, *arguments: str, name: str = "orders-1.json") -> Any:
        return desk.run("apply", desk.path(name), "--policy", "orders", *arguments)

    def test_one_edit_is_shown_made_and_undone(self, fitted: Desk) -> None:
        result = self.apply(fitted, "--yes")
        assert result.exit_code == 0, result.output
        edited = fitted.policy.read_text()
        added = {line for line in edited.splitlines() if line not in POLICY.splitlines()}
        assert added == {
            "confidence: {calibrator: orders-1, when_uncalibrated: hold}   # until it is calibrated",
            "thresholds: {from_calibrator: true}",
        }
        assert all(f"+{line}" in result.stdout for line in added)
        assert artefact(fitted, "calibrators/orders-1.json") == artefact(fitted)
        assert fitted.run("rollback", "orders").exit_code == 0
        assert fitted.policy.read_text() == POLICY

    def test_without_consent_nothing_changes(self, fitted: Desk) -> None:
        result = self.apply(fitted)
        assert result.exit_code == 1
        assert "Apply this?" in result.stdout
        assert fitted.policy.read_text() == POLICY
        assert not (fitted.folder / "calibrators").exists()

    def test_recorded_traffic_is_decided_on_again(self, fitted: Desk) -> None:
        asyncio.run(self.traffic(fitted.store_url))
        result = self.apply(fitted, "--yes")
        assert "7 recorded responses, decided on again" in result.stdout
        assert "3 more cannot be told" in result.stdout
        table = dict(re.findall(r"│ (\w+) +│ +(\d+ │ +\d+) │", result.stdout))
        moved = {name: tuple(map(int, each.split("│"))) for name, each in table.items()}
        assert moved == {"return": (0, 4), "flag": (0, 1), "hold": (7, 2), "block": (0, 0)}

    async def traffic(self, url: str) -> None:
        """Four sure answers, one of them that is cut short besides, two doubtful ones; and three that cannot be told."""
        store = await open_store(url)

        def detail(logprob: float, outcome: str = "pass") -> dict[str, Any]:
            finished = {"check": "finished", "outcome": outcome, "cost_usd": None}
            signals = {"mean_logprob": logprob, "n_tokens": 20.0}
            return {"evidence": {"signals": signals, "results": {"finished": finished}}}

        fields: dict[str, Any] = {
            "policy": "orders@1",
            "model": "m",
            "risk": RiskTier.MEDIUM,
            "task_type": "orders",
        }
        details = [*[detail(-1e-4)] * 4, detail(-1e-4, "fail"), *[detail(-1.0)] * 2]
        unchecked = {"evidence": {"signals": {"mean_logprob": -1e-4}, "results": {}}}
        for each in [*details, unchecked, {"evidence": "?"}]:
            await store.record(a_decision(**fields, detail=each))
        await store.record(a_decision(**fields, detail=detail(-1e-4), status=500))
        await store.record(a_decision(**(fields | {"policy": "others@1"}), detail=detail(-1e-4)))
        await store.close()

    def test_traffic_of_before_a_signal_was_computed_cannot_be_told(self, fitted: Desk) -> None:
        path = fitted.folder / "orders-1.json"
        document = orjson.loads(path.read_bytes())
        document["score"]["coefficients"] = {"unsure_tokens": -1.0}
        path.write_bytes(orjson.dumps(document))
        asyncio.run(self.traffic(fitted.store_url))
        assert "10 more cannot be told" in self.apply(fitted, "--yes").stdout

    def test_an_artefact_for_other_checks_is_refused(self, fitted: Desk) -> None:
        scored = POLICY.replace("on_fail: flag", "on_fail: score")
        fitted.policy.write_text(scored)
        result = self.apply(fitted, "--yes")
        assert result.exit_code == 1
        assert "the checks that feed the score have changed; fit it again" in result.stderr
        assert fitted.policy.read_text() == scored

    def test_an_artefact_never_takes_the_place_of_another(self, fitted: Desk) -> None:
        assert self.apply(fitted, "--yes").exit_code == 0
        fitted.fit("orders-1.json", "--alpha", "0.12")
        result = self.apply(fitted, "--yes")
        assert result.exit_code == 1
        assert "another calibrator named orders-1 is there" in result.stderr

    def test_changes_are_undone_one_by_one(self, fitted: Desk) -> None:
        self.apply(fitted, "--yes")
        first = fitted.policy.read_text()
        fitted.fit("orders-2.json", "--alpha", "0.12")
        assert self.apply(fitted, "--yes", name="orders-2.json").exit_code == 0
        assert "orders-2" in fitted.policy.read_text()
        fitted.run("rollback", "orders")
        assert fitted.policy.read_text() == first
        fitted.run("rollback", "orders")
        assert fitted.policy.read_text() == POLICY
        result = fitted.run("rollback", "orders")
        assert result.exit_code == 1
        assert "no change of policy orders is kept" in result.stderr

    def test_a_policy_edited_since_is_not_put_back_over_the_edit(self, fitted: Desk) -> None:
        self.apply(fitted, "--yes")
        edited = fitted.policy.read_text() + "audit: {rate: 0.5}\n"
        fitted.policy.write_text(edited)
        result = fitted.run("rollback", "orders")
        assert result.exit_code == 1
        assert "was edited since the change" in result.stderr
        assert fitted.policy.read_text() == edited

    def test_unsure_keeps_what_the_policy_says(self, fitted: Desk) -> None:
        fitted.policy.write_text(POLICY + "thresholds:\n  confident: 0.9\n  unsure: 0.3\n")
        assert self.apply(fitted, "--yes").exit_code == 0
        assert "thresholds: {from_calibrator: true, unsure: 0.3}\n" in fitted.policy.read_text()

    def test_if_the_policy_cannot_be_written_it_is_as_it_was(self, fitted: Desk) -> None:
        (fitted.folder / "history").write_text("in the way")
        result = self.apply(fitted, "--yes")
        assert result.exit_code == 1
        assert "cannot be written" in result.stderr
        assert fitted.policy.read_text() == POLICY


class TestPropose:
    def propose(self, desk: Desk, *arguments: str) -> Any:
        return desk.run(
            "propose",
            *("--policy", "orders", "--out", desk.path("orders-2.json")),
            *("--labels", desk.path("labels.jsonl"), *arguments),
        )

    def labels(self, desk: Desk, **kinds: Any) -> None:
        desk.labels(some_labels(**kinds, at="2999-01-01T00:00:00Z", prefix="new"))

    def test_a_better_one_is_proposed_with_the_promise_in_force_and_applied(
        self, fitted: Desk
    ) -> None:
        TestApply().apply(fitted, "--yes")
        self.labels(fitted, n=900, seed=5, chance=lambda p: p**3 + 0.02 * (1 - p))
        result = self.propose(fitted, "--apply")
        assert result.exit_code == 0, result.output
        assert "Proposed: log loss" in result.stdout
        assert artefact(fitted, "orders-2.json").certificates[0].alpha == 0.1
        assert "calibrator: orders-2" in fitted.policy.read_text()

    def test_each_tier_keeps_its_promise_and_its_share(self, desk: Desk) -> None:
        low: dict[str, Any] = {"prefix": "l", "tier": "low"}
        high: dict[str, Any] = {"prefix": "h", "tier": "high"}
        desk.labels(some_labels(600, seed=1, **low) + some_labels(600, seed=2, **high))
        alphas = ("--per", "tier", "--alpha", "low=0.3,high=0.2")
        assert desk.fit("orders-1.json", *alphas).exit_code == 0
        assert TestApply().apply(desk, "--yes").exit_code == 0

        later: dict[str, Any] = {"at": "2999-01-01T00:00:00Z", "chance": lambda p: p**3}
        new = [some_labels(900, 3, **later, **low), some_labels(900, 4, **later, **high)]
        desk.labels([row for rows in new for row in rows])
        result = self.propose(desk)
        assert result.exit_code == 0, result.output
        certificates = artefact(desk, "orders-2.json").certificates
        assert {each.tier: each.alpha for each in certificates} == {"low": 0.3, "high": 0.2}
        assert "Proposed: log loss" in result.stdout

    def test_a_promise_that_one_tier_breaks_is_not_hidden_by_another(self, fitted: Desk) -> None:
        calibrator = artefact(fitted)
        given: dict[str, Any] = {"mode": "certified", "delta": 0.025, "threshold": 0.9, "n": 600}
        low = Certificate(alpha=0.1, tier=RiskTier.LOW, **given)
        high = Certificate(alpha=0.02, tier=RiskTier.HIGH, **given)
        kept = {low: (300, 3), high: (100, 6)}
        why = Comparison(400, 0.5, 0.4, kept).refusal(calibrator)
        assert why is not None
        assert "certificate (high) does not hold: 6 errors among the 100" in why
        assert Comparison(400, 0.5, 0.4, kept | {high: (100, 3)}).refusal(calibrator) is None

    def test_one_that_would_return_less_waits_for_second_opinions(self, fitted: Desk) -> None:
        calibrator = artefact(fitted)
        (certificate,) = calibrator.certificates
        less = Comparison(400, 0.5, 0.4, {certificate: (200, 3)}, returned_old=210)
        assert less.refusal(calibrator) is None
        why = less.refusal(calibrator, waiting=2)
        assert why is not None
        assert "return 200, that in force 210, and 2 suspect labels wait" in why
        more = Comparison(400, 0.5, 0.4, {certificate: (210, 3)}, returned_old=210)
        assert more.refusal(calibrator, waiting=2) is None

    def test_reviewers_are_asked_again_before_it_is_proposed(self, desk: Desk) -> None:
        asyncio.run(TestSecondOpinions().review(desk.store_url))
        out = desk.path("orders-2.json")
        arguments = ("--policy", "orders", "--from-reviews", "--out", out, "--alpha", "0.02")
        result = desk.run("propose", *arguments)
        assert result.exit_code in (0, 3), result.output
        assert "Second opinions: " in result.stdout
        assert asyncio.run(TestSecondOpinions().opine(desk.store_url, "bob")) >= 1

    def test_one_that_is_no_better_is_not(self, fitted: Desk) -> None:
        fitted.labels(some_labels(4000, seed=4))
        assert fitted.fit("orders-0.json", "--alpha", "0.1").exit_code == 0
        TestApply().apply(fitted, "--yes", name="orders-0.json")
        self.labels(fitted, n=150, seed=6)
        result = self.propose(fitted, "--apply", "--alpha", "0.3")
        assert result.exit_code == 3
        assert "Not proposed: " in result.stderr
        assert "calibrator: orders-0" in fitted.policy.read_text()

    def test_one_without_a_certificate_is_not(self, fitted: Desk) -> None:
        TestApply().apply(fitted, "--yes")
        self.labels(fitted, n=400, seed=5, chance=lambda p: p / 2)
        result = self.propose(fitted)
        assert result.exit_code == 3
        assert "Not proposed: cannot certify 10 %" in result.stderr

    def test_only_labels_given_since_count(self, fitted: Desk) -> None:
        TestApply().apply(fitted, "--yes")
        result = self.propose(fitted)
        assert result.exit_code == 1
        assert "there are no labels since" in result.stderr
        self.labels(fitted, n=90, seed=5)
        assert "90 labels since the last calibrator are too few" in self.propose(fitted).stderr

    def test_without_one_in_force_the_promise_must_be_named(self, desk: Desk) -> None:
        desk.labels(some_labels(600, seed=2))
        assert "say what is to be promised" in self.propose(desk).stderr
        result = self.propose(desk, "--alpha", "0.1")
        assert result.exit_code == 0, result.output
        assert "none is in force" in result.stdout


def test_without_the_extra_it_says_what_to_install(fitted: Desk) -> None:
    """And what needs no numbers works without: a gateway's machine can apply and roll back."""

    def without_numpy(*arguments: str) -> subprocess.CompletedProcess[str]:
        given = ["calibrate", arguments[0], "--config", str(fitted.config), *arguments[1:]]
        hidden = "import sys; sys.modules['numpy'] = sys.modules['sklearn'] = None"
        program = f"{hidden}; from gateway.cli import app; app({given!r})"
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    labels = ("--labels", fitted.path("labels.jsonl"))
    fit = without_numpy("fit", "--policy", "orders", *labels, "--out", fitted.path("x.json"))
    assert fit.returncode == 1
    assert "install holdgate[analysis]" in fit.stderr
    applied = without_numpy("apply", fitted.path("orders-1.json"), "--policy", "orders", "--yes")
    assert applied.returncode == 0, applied.stderr
    assert without_numpy("rollback", "orders").returncode == 0


def test_history_is_json_that_a_person_can_read(fitted: Desk) -> None:
    fitted.run("apply", fitted.path("orders-1.json"), "--policy", "orders", "--yes")
    (kept,) = (fitted.folder / "history" / "orders").iterdir()
    assert orjson.loads(kept.read_bytes())["before"] == POLICY
