"""Who is asking: API keys with roles, and what is open on loopback."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from gateway.errors import Forbidden, Unauthenticated
from gateway.ports import Store
from gateway.records import ApiKey, Role

_PREFIX = "hgk_"
_CACHE_S = 5.0
_CACHE_SIZE = 4096
_LOOPBACK = re.compile(r"((localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Caller:
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
        self._store = store
        self._required = required
        self._monotonic_s = monotonic_s
        self._known: OrderedDict[str, tuple[float, ApiKey | None]] = OrderedDict()
        self._asked_at = float("-inf")
        self._asks = required is not False

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
        key = await self._key(digest(secret.strip()))
        if key is None:
            raise Unauthenticated(
                "This API key is not known here; `holdgate key create` makes one."
            )
        return Caller(key.name, key.role, key)

    async def _asks_for_keys(self) -> bool:
        now = self._monotonic_s()
        if self._required is None and now - self._asked_at >= _CACHE_S:
            # A revoked key counts: to revoke the last one must not open the door to everybody.
            self._asks = bool(await self._store.keys())
            self._asked_at = now
        return self._asks

    async def _key(self, key_digest: str) -> ApiKey | None:
        now = self._monotonic_s()
        at, key = self._known.get(key_digest, (float("-inf"), None))
        if now - at >= _CACHE_S:
            key = await self._store.key_by_digest(key_digest)
            self._known[key_digest] = now, key
            if len(self._known) > _CACHE_SIZE:
                self._known.popitem(last=False)
        return key
