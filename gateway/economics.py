"""What the layers of the cascade did and cost, as it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from gateway.records import Economics
from policies import parse_duration_s
from validators import JSON


class Row(NamedTuple):
    """A layer of the cascade as it is shown; see `gateway.records.Layer`."""

    layer: str
    requests: int
    share: float | None
    usd: float | None
    unknown: int
    latency_p50_ms: float | None
    latency_p95_ms: float | None


def moment_of(since: str, now: datetime) -> datetime:
    """The time that a text such as `24h` or `2030-01-31T00:00:00Z` means; one without a zone is UTC.

    Raises
    ------
    ValueError
        If it is neither a duration nor a time.
    """
    try:
        at = datetime.fromisoformat(since)
    except ValueError:
        try:
            seconds = parse_duration_s(since)
            assert isinstance(seconds, float | int)
            return now - timedelta(seconds=seconds)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{since[:50]!r} is neither a duration, such as 90m, 24h or 7d, nor a time, such as 2030-01-31T00:00:00Z"
            ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def rows(found: Economics, usd_per_minute: float | None) -> Iterator[Row]:
    """Each layer, with its share of all decisions; for people the cost follows from the price of their minute, if known."""
    person_usd = None if usd_per_minute is None else usd_per_minute * found.person_minutes
    for each in found.layers:
        yield Row(
            each.name,
            each.requests,
            each.requests / found.decisions if found.decisions else None,
            person_usd if each.name == "person" else each.usd,
            each.unknown,
            each.latency_p50_ms,
            each.latency_p95_ms,
        )


def shown(found: Economics, since: datetime, usd_per_minute: float | None) -> dict[str, JSON]:
    """The economics as `GET /admin/economics` gives them."""
    return {
        "since": since.isoformat(),
        "decisions": found.decisions,
        "layers": [row._asdict() for row in rows(found, usd_per_minute)],
        "person_minutes": found.person_minutes,
        "abandoned_usd": found.abandoned_usd,
    }
