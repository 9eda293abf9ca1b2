"""What judges cost, and how much of it a stage may spend in a day.

A stage's account is kept in memory, so that no request asks the database for it; what was spent is made durable with the
decision it was spent on. Accounts are read from the store at the start, so that a restart forgets nothing, and again every
REFRESH_S seconds, so that replicas which share a store share a budget: each knows what the others have recorded until then.
Together they can overspend it by what is spent in that time, and by no more than what is under way within one replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from importlib.util import find_spec
from math import nan
from pathlib import Path

import msgspec

from gateway import logs
from gateway.errors import StoreError
from gateway.ports import Clock, Store
from gateway.records import Spend
from gateway.settings import ModelEntry, Price

#: How often accounts are brought up to date with the store.
REFRESH_S = 2.0

#: English text has about four bytes a token, most other languages fewer: a guess on the high side.
_BYTES_PER_TOKEN = 3
_LIKELY_OUTPUT_TOKENS = 500

_TABLE = "model_prices_and_context_window_backup.json"


class PromptDetails(msgspec.Struct):
    """How much of a prompt the provider had read before."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The tokens a provider counts (OpenAI API, `CompletionUsage`)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class _Row(msgspec.Struct):
    """A model in litellm's table, in US dollars per token."""

    input_cost_per_token: float | None = None
    output_cost_per_token: float | None = None
    cache_read_input_token_cost: float | None = None


def cost_usd(price: Price, usage: Usage) -> float:
    """What a call cost."""
    details = usage.prompt_tokens_details
    cached = min((details.cached_tokens if details else None) or 0, usage.prompt_tokens)
    cached_price = price.cached_input_usd_per_million_tokens
    full = price.input_usd_per_million_tokens
    tokens_usd = (
        (usage.prompt_tokens - cached) * full
        + cached * (full if cached_price is None else cached_price)
        + usage.completion_tokens * price.output_usd_per_million_tokens
    )
    return tokens_usd / 1e6


def likely_usd(price: Price | None, body: bytes, max_tokens: int | None) -> float | None:
    """What a call with that body will cost at about most: reserved before, and charged where nobody says what it was.

    None without a price.
    """
    if price is None:
        return None
    likely = Usage(len(body) // _BYTES_PER_TOKEN, max_tokens or _LIKELY_OUTPUT_TOKENS)
    return cost_usd(price, likely)


class Prices:
    """What models cost: what holdgate.yaml says, or litellm's table where litellm is installed, or nobody knows."""

    def __init__(self, entries: Sequence[ModelEntry]) -> None:
        self._entries = entries
        self._known: dict[str, Price | None] = {}

    def of(self, model: str) -> Price | None:
        """The price of a model; None if it is not known."""
        if model not in self._known:
            entry = next((e for e in self._entries if fnmatchcase(model, e.match)), None)
            self._known[model] = None if entry is None else entry.price or _listed(entry, model)
        return self._known[model]


def _listed(entry: ModelEntry, model: str) -> Price | None:
    """The price that litellm's table gives. The file is read, litellm is not imported: that takes 3 s and 165 MB."""
    found = find_spec("litellm")
    path = Path(found.origin).with_name(_TABLE) if found and found.origin else None
    if path is None or not path.is_file():
        return None
    table = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    name = entry.rename or model
    raw = table.get(f"{entry.provider}/{name}") or table.get(name)
    if raw is None:
        return None
    row = msgspec.json.decode(raw, type=_Row)
    if row.input_cost_per_token is None or row.output_cost_per_token is None:
        return None
    cached = row.cache_read_input_token_cost
    return Price(
        input_usd_per_million_tokens=1e6 * row.input_cost_per_token,
        output_usd_per_million_tokens=1e6 * row.output_cost_per_token,
        cached_input_usd_per_million_tokens=None if cached is None else 1e6 * cached,
    )


@dataclass(slots=True)
class Account:
    """What may be spent, what has been, and what calls under way have reserved; in US dollars."""

    spent_usd: float = 0.0
    reserved_usd: float = 0.0


class Purse:
    """What one judge takes from an account for one answer: `spent_usd` so far, as far as prices are known."""

    def __init__(self, account: Account, limit_usd: float | None = None) -> None:
        self._account = account
        self._limit_usd = limit_usd
        self._is_known = True
        self.spent_usd = 0.0

    @property
    def cost_usd(self) -> float:
        """What was spent; NaN if some of it is not known."""
        return self.spent_usd if self._is_known else nan

    def reserve(self, usd: float | None) -> bool:
        """Set so much aside for a call; False if that would be more than is left. Every True wants a `pay`."""
        account, limit_usd = self._account, self._limit_usd
        taken_usd = account.spent_usd + account.reserved_usd + (usd or 0.0)
        if limit_usd is not None and taken_usd > limit_usd:
            return False
        account.reserved_usd += usd or 0.0
        return True

    def pay(self, reserved_usd: float | None, usd: float | None) -> None:
        """Spend what a call cost in place of what was reserved for it; None if that is not known."""
        self._account.reserved_usd -= reserved_usd or 0.0
        self._account.spent_usd += usd or 0.0
        self.spent_usd += usd or 0.0
        self._is_known = self._is_known and usd is not None


class Spending:
    """The accounts of all stages, each for a day (UTC)."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._day = clock.now().date()
        self._accounts: dict[tuple[str, str], Account] = {}
        self._abandoned: list[Spend] = []

    def account(self, policy: str, stage: str) -> tuple[date, Account]:
        """Today's account of a stage."""
        self._turn_page()
        return self._day, self._accounts.setdefault((policy, stage), Account())

    def abandon(self, spends: Iterable[Spend]) -> None:
        """Have spending recorded that no decision will carry: its client left, or its answer was asked for again."""
        self._abandoned += [spend for spend in spends if spend.usd > 0]

    async def refresh(self) -> None:
        """Record what was abandoned, and learn what other replicas have spent. Raises `StoreError`."""
        self._turn_page()
        if self._abandoned:
            spends, self._abandoned = self._abandoned, []
            try:
                await self._store.spend(spends)
            except StoreError:
                self._abandoned[:0] = spends
                raise
        day = self._day
        for key, usd in (await self._store.spent(day)).items():
            if day == self._day:
                account = self._accounts.setdefault(key, Account())
                # What was spent here and is not durable yet is in our sum alone, what others spent in the store's alone.
                account.spent_usd = max(account.spent_usd, usd)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except StoreError as error:
                logs.warning("spending_not_refreshed", error=error.message)

    async def close(self) -> None:
        """Record what was abandoned."""
        try:
            await self.refresh()
        except StoreError as error:
            lost_usd = sum(spend.usd for spend in self._abandoned)
            logs.error("spending_not_recorded", usd=lost_usd, error=error.message)

    def _turn_page(self) -> None:
        """Begin every account anew on a new day; what is under way is paid from the old ones."""
        today = self._clock.now().date()
        if today != self._day:
            self._day, self._accounts = today, {}
