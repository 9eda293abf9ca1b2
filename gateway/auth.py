"""Who is asking: API keys with roles, and what is open on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from math import inf
from typing import Generic, TypeVar

import msgspec

from gateway.errors import Forbidden, Unauthenticated
from gateway.ports import Store
from gateway.records import ApiKey, Role

T = TypeVar("T")

_PREFIX = "hgk_"
_CACHE_S = 5.0
_CACHE_SIZE = 4096
_LOOPBACK = re.compile(r"((localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?)?", re.IGNORECASE)


class Caller(msgspec.Struct, frozen=True):
    """Who is asking. `key` is None where no key is asked for; then everything is allowed and the name is `local`."""

    name: str
    role: Role
    key: ApiKey | None = None

    def require(self, *roles: Role) -> None:
        """Return if the caller has one of these roles (an admin has all).

        Raises
        ------
        Forbidden
            If not.
        """
        if self.role is not Role.ADMIN and self.role not in roles:
            wanted = " or ".join(role.value for role in roles)
            raise Forbidden(
                f"This needs a key with the role {wanted}; {self.name!r} has the role {self.role.value}."
            )


def new_key(key_id: str, name: str, role: Role, now: datetime) -> tuple[ApiKey, str]:
    """A fresh API key and its secret (256 random bits), which is shown once and not kept."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    return ApiKey(id=key_id, name=name, role=role, digest=digest(secret), created_at=now), secret


def digest(secret: str) -> str:
    """The SHA-256 (hex) of a key's secret; a slow hash adds nothing to 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Authenticator:
    """Finds the caller of a request. Keys are looked up at most every 5 s, so a revoked key stops working within that.

    `required` None asks for keys only once the store has one (fit for loopback); True always does.
    """

    def __init__(
        self, store: Store, *, required: bool | None, monotonic_s: Callable[[], float]
    ) -> None:
        self._required = required
        self._keys = _Lookups(store.key_by_digest, monotonic_s)
        self._any_key = _Lookups(partial(_has_keys, store), monotonic_s)

    async def caller(self, authorization: str | None, *, origin: str | None, host: str) -> Caller:
        """The caller that an `Authorization: Bearer` header names.

        Raises
        ------
        Unauthenticated
            If a key is needed and there is none, or it is unknown or revoked.
        Forbidden
            If no key is needed and a browser page of another origin asks, or one that has its own name resolved to here.
        """
        if not await self._asks_for_keys():
            if self._required is None and not _LOOPBACK.fullmatch(host):
                raise Forbidden(
                    f"Without API keys, only requests to localhost are answered, not to {host[:100]!r}."
                )
            if origin is not None and origin.partition("://")[2] != host:
                raise Forbidden(
                    "Without API keys, requests from pages of another origin are refused."
                )
            return Caller("local", Role.ADMIN)
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated("Send a Holdgate API key: 'Authorization: Bearer hgk_…'.")
        key = await self._keys.of(digest(secret.strip()))
        if key is None:
            raise Unauthenticated(
                "This API key is not known here; `holdgate key create` makes one."
            )
        return Caller(key.name, key.role, key)

    async def _asks_for_keys(self) -> bool:
        # A revoked key counts: to revoke the last one must not open the door to everybody.
        return self._required is True or (
            self._required is None and await self._any_key.of("") is True
        )


async def _has_keys(store: Store, _: str) -> bool:
    return bool(await store.keys())


def _outcome(task: asyncio.Task[T]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


class _Lookups(Generic[T]):
    """Answers of the store, at most 5 s old; while they are asked for, renewed ahead of time so that nobody waits."""

    def __init__(
        self, find: Callable[[str], Awaitable[T]], monotonic_s: Callable[[], float]
    ) -> None:
        self._find = find
        self._monotonic_s = monotonic_s
        self._known: OrderedDict[str, tuple[float, T]] = OrderedDict()
        self._looking: dict[str, asyncio.Task[T]] = {}

    async def of(self, name: str) -> T:
        known = self._known.get(name)
        age_s = self._monotonic_s() - known[0] if known else inf
        if known and age_s < _CACHE_S / 2:
            return known[1]
        if (looking := self._looking.get(name)) is None:
            looking = self._looking[name] = asyncio.create_task(self._look(name))
            looking.add_done_callback(_outcome)  # nobody may be waiting for it
        if known and age_s < _CACHE_S:
            return known[1]
        return await asyncio.shield(looking)

    async def _look(self, name: str) -> T:
        asked_at_s = self._monotonic_s()
        try:
            found = await self._find(name)
        finally:
            del self._looking[name]
        self._known[name] = asked_at_s, found
        if len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)
        return found
