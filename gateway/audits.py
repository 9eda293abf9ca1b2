"""How closely each policy is audited, and whether its calibrator may be believed: known in memory, true in the store.

No request asks the database. Standings are read at the start, so that a restart forgets nothing, and again every REFRESH_S
seconds, so that replicas which share a store agree by then. `gateway.monitors` and people change them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

from gateway import logs
from gateway.errors import StoreError
from gateway.ports import Store
from gateway.records import Standing
from policies import AuditLevel, Calibrator

#: How often standings are brought up to date with the store.
REFRESH_S = 2.0


def artefact_of(calibrator: Calibrator | None) -> str | None:
    """What tells one fitted artefact from another of the same name."""
    if calibrator is None:
        return None
    return f"{calibrator.name}@{calibrator.created_at.isoformat()}"


class Audits:
    """Which returned responses are reviewed after the fact.

    `secret` keys the draw (BLAKE2b, RFC 7693), so that a sample can be reproduced and not foreseen.
    """

    def __init__(self, store: Store, *, secret: bytes) -> None:
        self._store = store
        self._key = hashlib.blake2b(secret).digest()
        self._standings: Mapping[str, Standing] = {}

    def draw(self, decision_id: str) -> float:
        """A number in [0, 1) that the decision's id and the secret determine."""
        mac = hashlib.blake2b(decision_id.encode(), key=self._key, digest_size=7)
        return int.from_bytes(mac.digest(), "big") / 2**56

    def level(self, policy: str) -> AuditLevel:
        """How closely a policy is audited: at first, tightened."""
        standing = self._standings.get(policy)
        return AuditLevel.TIGHTENED if standing is None else AuditLevel(standing.audit_level)

    def suspended(self, policy: str, calibrator: Calibrator | None) -> str | None:
        """Why the policy's calibrator may not be believed, None if it may; a new artefact may be."""
        standing = self._standings.get(policy)
        if standing is None or standing.suspended is None:
            return None
        return standing.suspended if standing.artefact == artefact_of(calibrator) else None

    async def refresh(self) -> None:
        """Learn where policies stand. Raises `StoreError`."""
        self._standings = {each.policy: each for each in await self._store.standings()}

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except StoreError as error:
                logs.warning("standings_not_refreshed", error=error.message)
