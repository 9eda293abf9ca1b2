"""What judges cost and may cost: prices, purses, and accounts that agree with the store."""

from __future__ import annotations

import sys
from datetime import timedelta
from math import isnan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.errors import StoreError
from gateway.records import Effort, Spend
from gateway.settings import ModelEntry, Price
from gateway.spending import (
    Account,
    Prices,
    PromptDetails,
    Purse,
    Spending,
    Usage,
    cost_usd,
    likely_usd,
)
from gateway.store import SqlStore, open_store
from tests.fakes import FakeClock
from tests.gateway.rig import broken
from tests.gateway.stores import NOW, a_decision

PRICE = Price(
    input_usd_per_million_tokens=2,
    output_usd_per_million_tokens=8,
    cached_input_usd_per_million_tokens=0.5,
)
KEY = ("refunds", "judge")


def a_spend(clock: FakeClock, usd: float) -> Spend:
    return Spend(clock.now().date(), *KEY, usd)


class TestPrices:
    def test_tokens_are_charged_by_kind(self) -> None:
        assert cost_usd(PRICE, Usage(1_000_000)) == 2
        assert cost_usd(PRICE, Usage(0, 1_000_000)) == 8
        cached = Usage(1_000_000, 0, PromptDetails(400_000))
        assert cost_usd(PRICE, cached) == pytest.approx(0.6 * 2 + 0.4 * 0.5)

    def test_cached_tokens_cost_as_much_as_others_if_the_price_does_not_say(self) -> None:
        price = Price(input_usd_per_million_tokens=2, output_usd_per_million_tokens=8)
        assert cost_usd(price, Usage(1_000_000, 0, PromptDetails(400_000))) == 2

    @given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**8))
    def test_no_usage_is_free_money(self, prompt: int, completion: int, cached: int) -> None:
        spent_usd = cost_usd(PRICE, Usage(prompt, completion, PromptDetails(cached)))
        assert 0 <= spent_usd <= (2 * prompt + 8 * completion) / 1e6 + 1e-9

    def test_what_a_call_is_likely_to_cost(self) -> None:
        assert likely_usd(PRICE, b"x" * 3000, 100) == pytest.approx((2 * 1000 + 8 * 100) / 1e6)
        assert likely_usd(PRICE, b"", None) == pytest.approx(8 * 500 / 1e6)
        assert likely_usd(None, b"x", 1) is None

    def test_the_first_entry_that_matches_says_what_a_model_costs(self) -> None:
        prices = Prices([ModelEntry(match="judge-*", price=PRICE), ModelEntry(match="j*")])
        assert prices.of("judge-1") == PRICE
        assert prices.of("jury") is None
        assert prices.of("other") is None

    def test_litellms_table_is_read_under_the_name_the_provider_has_for_the_model(self) -> None:
        prices = Prices(
            [
                ModelEntry(match="small", provider="anthropic", rename="claude-haiku-4-5"),
                ModelEntry(match="*"),
            ]
        )
        small, listed = prices.of("small"), prices.of("gpt-4o-mini")
        assert small is not None
        assert small.input_usd_per_million_tokens == pytest.approx(1.0)
        assert small.output_usd_per_million_tokens == pytest.approx(5.0)
        assert listed is not None
        assert list(listed.model_dump().values()) == pytest.approx([0.15, 0.60, 0.075])
        assert prices.of("nobody-knows-this-model") is None
        # The image model of the table has no price per token.
        assert prices.of("dall-e-3") is None


class TestPurse:
    def test_it_takes_no_more_than_the_limit_whoever_else_takes(self) -> None:
        account = Account()
        one, other = Purse(account, 1.0), Purse(account, 1.0)
        assert one.reserve(0.6)
        assert not other.reserve(0.6)
        one.pay(0.6, 0.3)
        assert other.reserve(0.6)
        other.pay(0.6, 0.7)
        assert (one.spent_usd, other.spent_usd, account.spent_usd) == (0.3, 0.7, 1.0)
        assert account.reserved_usd == pytest.approx(0)
        assert not one.reserve(0.01)

    def test_a_cost_that_is_not_known_stays_unknown(self) -> None:
        purse = Purse(Account())
        assert purse.reserve(None)
        purse.pay(None, 0.5)
        assert purse.cost_usd == 0.5
        purse.pay(None, None)
        assert isnan(purse.cost_usd)
        assert purse.spent_usd == 0.5

    @given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), max_size=30), st.floats(0.1, 10))
    def test_overspending_is_at_most_what_the_last_estimates_missed(
        self, calls: list[tuple[float, float]], limit_usd: float
    ) -> None:
        account = Account()
        purse = Purse(account, limit_usd)
        for likely_usd_, share in calls:
            if purse.reserve(likely_usd_):
                purse.pay(likely_usd_, likely_usd_ * share)
        assert account.spent_usd <= limit_usd * (1 + 1e-9)
        assert account.reserved_usd == pytest.approx(0, abs=1e-9)


class TestSpending:
    async def test_what_was_recorded_is_known_after_a_restart(self, store: SqlStore) -> None:
        clock = FakeClock()
        await store.spend([a_spend(clock, 1.5), a_spend(clock, 0.25)])
        again = Spending(store, clock)
        await again.refresh()
        assert again.account(*KEY)[1].spent_usd == 1.75

    async def test_replicas_learn_what_the_others_spent(self, store: SqlStore) -> None:
        clock = FakeClock()
        one, other = Spending(store, clock), Spending(store, clock)
        Purse(one.account(*KEY)[1]).pay(0, 1.0)
        one.abandon([a_spend(clock, 1.0)])
        assert other.account(*KEY)[1].spent_usd == 0
        await one.refresh()
        await other.refresh()
        assert [each.account(*KEY)[1].spent_usd for each in (one, other)] == [1.0, 1.0]

    async def test_what_is_not_durable_yet_is_not_forgotten(self, store: SqlStore) -> None:
        spending = Spending(store, FakeClock())
        Purse(spending.account(*KEY)[1]).pay(0, 1.0)
        await spending.refresh()
        assert spending.account(*KEY)[1].spent_usd == 1.0

    async def test_a_new_day_has_new_accounts(self, store: SqlStore) -> None:
        clock = FakeClock()
        spending = Spending(store, clock)
        yesterday, account = spending.account(*KEY)
        late = Purse(account)
        assert late.reserve(1.0)
        clock.advance(86400)
        today, fresh = spending.account(*KEY)
        late.pay(1.0, 1.0)
        assert today - yesterday == timedelta(days=1)
        assert (account.spent_usd, fresh.spent_usd) == (1.0, 0.0)

    async def test_what_cannot_be_recorded_now_is_recorded_later(
        self, sqlite_store: SqlStore, database: Path
    ) -> None:
        clock = FakeClock()
        spending = Spending(sqlite_store, clock)
        spending.abandon([a_spend(clock, 0.5)])
        with broken(database, "spending"):
            with pytest.raises(StoreError):
                await spending.refresh()
            await spending.close()
        await spending.close()
        assert await sqlite_store.spent(clock.now().date()) == {KEY: 0.5}

    async def test_litellm_is_not_imported_for_a_price(self) -> None:
        loaded = "litellm" in sys.modules
        Prices([ModelEntry(match="*")]).of("gpt-4o")
        assert ("litellm" in sys.modules) is loaded


async def test_spending_of_a_decision_is_durable_with_it(store_url: str) -> None:
    """Either both or neither: the account grows in the decision's own transaction."""
    store = await open_store(store_url)
    spend = Spend(NOW.date(), *KEY, 0.25)
    effort = Effort(1.0, 2.0, 0.25, (spend,))
    decision = a_decision(effort=effort)
    await store.record(decision)
    with pytest.raises(StoreError):
        await store.record(decision)
    assert await store.spent(NOW.date()) == {KEY: 0.25}
    assert await store.decision(decision.id) == replace(decision, effort=Effort(1.0, 2.0, 0.25))
    await store.close()
