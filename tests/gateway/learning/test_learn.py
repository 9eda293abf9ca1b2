"""`holdgate learn`: what is picked, and what the weekly report says and never shows."""

from __future__ import annotations

import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.learning.picking import Source, candidates, line_of, picked
from gateway.learning.report import html_report, markdown_report
from gateway.learning.samples import samples
from gateway.learning.weekly import Weekly, weekly
from gateway.records import TaskKind, Verdict
from gateway.store import SqlStore
from policies.model import Action
from tests.gateway.learning.reviewed import POLICIES, asks, judge, say
from tests.gateway.learning.test_exports import run
from tests.gateway.learning.test_exports import shop as shop
from tests.gateway.rig import chat
from tests.gateway.stores import NOW, a_decision, later

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)> | # *x* [y](javascript:z) `w`"


UNTIL = later(300)


async def report(
    store: SqlStore, since: datetime = NOW, until: datetime = UNTIL, **more: Any
) -> Weekly:
    found = samples(store, POLICIES, since=since - (until - since))
    return await weekly(found, POLICIES, since=since, until=until, **more)


class TestPick:
    async def test_asks_about_what_is_unsure_answered_and_not_judged(self, store: SqlStore) -> None:
        texts = {"sure": 0.99, "unsure": 0.2, "middling": 0.6}
        ids = {}
        for text, confidence in texts.items():
            each = a_decision(
                policy="full@1",
                confidence=confidence,
                request=asks(f"question {text}"),
                response=chat(f"answer {text}"),
            )
            await store.record(each)
            ids[text] = each.id
        await judge(store, Verdict.REJECT, confidence=0.01)
        await store.record(a_decision(policy="digest@1", confidence=0.0))
        await store.record(a_decision(policy="full@1", status=500, confidence=0.0))
        found, count = await candidates(store, POLICIES, Source.UNLABELLED, since=NOW, policy=None)
        assert count == 3
        assert [each.decision_id for each in picked(found, 2)] == [ids["unsure"], ids["middling"]]
        line: Any = await line_of(store, POLICIES, picked(found, 1)[0])
        assert (line["id"], line["weight"]) == (ids["unsure"], round(1 / 0.21, 4))
        assert line["response"]["choices"][0]["message"]["content"] == "answer unsure"
        assert await candidates(
            store, POLICIES, Source.UNLABELLED, since=later(1), policy=None
        ) == ([], 0)

    async def test_buffer_is_what_was_corrected_rejected_or_unsure(self, store: SqlStore) -> None:
        wanted = {
            await judge(store, Verdict.REJECT, kind=TaskKind.AUDIT),
            await judge(store, Verdict.CORRECT, correction=chat("Six.")),
            await judge(store, Verdict.APPROVE, kind=TaskKind.HOLD),
        }
        await judge(store, Verdict.APPROVE, kind=TaskKind.AUDIT)
        disputed = await judge(store, Verdict.APPROVE)
        await say(store, disputed, acceptable=False)
        found, _ = await candidates(store, POLICIES, Source.BUFFER, since=NOW, policy=None)
        assert {each.decision_id for each in found} == wanted

    async def test_what_is_written_is_masked_as_the_policy_says(self, store: SqlStore) -> None:
        await store.record(
            a_decision(
                policy="redacted@1", request=asks("I am ann@example.com"), response=chat("Hello")
            )
        )
        found, _ = await candidates(store, POLICIES, Source.UNLABELLED, since=NOW, policy=None)
        assert "ann@example.com" not in found[0].text
        assert b"ann@example.com" not in orjson.dumps(await line_of(store, POLICIES, found[0]))


class TestWeekly:
    async def test_counts_times_policies_and_categories(self, store: SqlStore) -> None:
        await judge(store, Verdict.APPROVE)
        await judge(store, Verdict.REJECT, reason="wrong price", action=Action.RETURN)
        await judge(store, Verdict.CORRECT, correction=chat("Six."), policy="digest@1")
        told = a_decision(policy="full@1", action=Action.RETURN, request=asks(), response=chat("x"))
        await store.record(told)
        await say(store, told.id, acceptable=False)
        found = await report(store)
        assert (found.now.judged, found.now.mistakes, found.now.went_out) == (4, 3, 2)
        assert (found.now.corrected, found.now.rejected, found.now.share) == (1, 2, 0.75)
        assert {name: each.mistakes for name, each in found.policies.items()} == {
            "digest": 1,
            "full": 2,
        }
        assert set(found.categories) == {"wrong price", "corrected", "no reason given"}
        earlier = await report(store, since=later(200), until=later(400))
        assert (earlier.now.judged, earlier.before.judged) == (0, 4)

    async def test_patterns_are_by_category_and_topic_and_name_levers(
        self, store: SqlStore
    ) -> None:
        results = {
            "tone": {"outcome": "fail", "opinion": None},
            "grounded": {"outcome": "pass", "opinion": {"rationale": ""}},
        }
        detail: dict[str, Any] = {"evidence": {"results": results}}
        for number in range(6):
            await judge(
                store,
                Verdict.CORRECT,
                reason="invented",
                request=asks(f"When does the courier bring parcel {number}?"),
                response=chat("The courier brings your parcel tomorrow."),
                correction=chat("I do not know."),
                action=Action.RETURN,
                confidence=0.9 + number / 100,
                detail=detail,
            )
        for number in range(2):
            await judge(
                store,
                Verdict.REJECT,
                reason="invented",
                request=asks(f"What does plan {number} cost with the annual discount?"),
                response=chat("Nine dollars with the annual discount."),
            )
        parcels, plans = (await report(store)).patterns
        assert (len(parcels.mistakes), len(plans.mistakes)) == (6, 2)
        assert "courier" in parcels.terms
        assert "discount" in plans.terms
        text = "\n".join(parcels.levers)
        assert "6 of 6 went out, with a confidence of 0.90 to 0.95" in text
        assert "Check tone fails on 6 of 6" in text
        assert "Judge grounded passes 6 of 6" in text
        assert "6 have a correction" in text
        assert plans.levers == (
            "No check fails on any of them: write one, or a rubric, for what they share.",
        )

    @pytest.mark.parametrize("policy", ["redacted", "digest", "gone"])
    async def test_content_that_a_policy_keeps_to_itself_is_nowhere_in_it(
        self, store: SqlStore, policy: str
    ) -> None:
        await judge(
            store,
            Verdict.REJECT,
            policy=f"{policy}@1",
            request=asks("CANARY words"),
            response=chat("CANARY words"),
        )
        found = await report(store)
        assert found.now.mistakes == 1
        assert "CANARY" not in html_report(found).upper() + markdown_report(found).upper()
        assert "not shown" in html_report(found)

    async def test_nothing_that_others_wrote_is_html_or_markdown(self, store: SqlStore) -> None:
        for verdict, reason in ((Verdict.REJECT, HOSTILE), (Verdict.REJECT, None)):
            await judge(
                store,
                verdict,
                reason=reason,
                request=asks(
                    f"{HOSTILE}\u202eevil\x1b[2J https://evil.example\n# heading\n\n<b>bold</b>"
                ),
                response=chat(HOSTILE * 40),
            )
        found = await report(store)
        tags = _Tags()
        tags.feed(html_report(found))
        assert tags.seen <= {
            *("html", "head", "meta", "title", "style", "body"),
            *("h1", "h2", "h3", "p", "ul", "li", "table", "tr", "th", "td"),
        }
        text = markdown_report(found)
        assert not {"\u202e", "\x1b"} & set(html_report(found) + text)
        assert "<" not in text
        assert "://" not in text
        assert not any(line.startswith("# ") for line in text.splitlines()[1:])
        assert not set("`[]*!") & set(re.sub(r"\\.", "", text))

    async def test_nothing_at_all_is_said_so(self, store: SqlStore) -> None:
        found = await report(store)
        for text in (html_report(found), markdown_report(found)):
            assert "nothing was found that people did not accept" in text

    async def test_more_than_anybody_reads_is_cut_and_said(self, store: SqlStore) -> None:
        for number in range(45):
            await judge(store, Verdict.REJECT, reason=f"reason {number:02}")
        text = html_report(await report(store))
        assert text.count("<h3>") == 20
        assert "The 20 greatest; 25 smaller ones are not shown." in text
        assert "and 33 more" in text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]


async def test_commands_write_their_files(shop: tuple[Path, SqlStore], tmp_path: Path) -> None:
    config, store = shop
    await judge(store, Verdict.REJECT, reason="wrong")
    file = tmp_path / "r.html"
    done = run(config, "learn", "report", "--since", "2030-01-01", "-o", str(file))
    assert done.returncode == 1
    assert "that time is not past" in done.stderr
    done = run(config, "learn", "report", "--since", "7d", "-o", str(file))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert file.read_text().startswith("<!doctype html>")
    assert file.with_suffix(".md").read_text().startswith("# What went wrong")
    await store.record(a_decision(policy="full@1", request=asks("Why?"), response=chat("So.")))
    done = run(config, "learn", "pick", "--n", "5", "--since", "2020-01-01")
    assert (done.returncode, done.stderr.strip()) == (0, "1 of 1 responses.")
    assert orjson.loads(done.stdout)["policy"] == "full"
    done = run(config, "learn", "pick", "--from", "thin air")
    assert done.returncode == 1
    assert "unlabelled or buffer" in done.stderr
