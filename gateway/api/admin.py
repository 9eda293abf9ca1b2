"""What operators and orchestrators ask: alive, ready, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response

from gateway import __version__, economics, quality
from gateway.api.depends import Admin, ServicesOf
from gateway.errors import InvalidRequest, StoreError
from policies import staleness
from validators import JSON

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=None)
async def healthz() -> dict[str, JSON]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz", response_model=None)
async def readyz(services: ServicesOf, response: Response) -> dict[str, JSON]:
    """Whether requests can be answered: 503 while decisions cannot be made durable."""
    store = "ok"
    alarms: list[JSON] = []
    try:
        await services.store.ping()
        alarms = [
            {
                "policy": each.policy,
                "kind": each.kind,
                "at": each.at.isoformat(),
                "message": each.message,
            }
            for each in await services.store.open_alarms()
        ]
    except StoreError as error:
        store = error.message
        response.status_code = 503
    policies, calibrators = services.policies.current, services.policies.calibrators
    return {
        "status": "ready" if store == "ok" else "not ready",
        "store": store,
        "policies": [policy.label for policy in policies.policies],
        "warnings": [str(problem) for problem in policies.warnings],
        "stale": [
            f"policy {policy.policy}: {message}"
            for policy in policies.policies
            for message in staleness(policy, calibrators)
        ],
        "alarms": alarms,
        "judges_down": list(services.interviewer.down),
        "waiting": len(services.room),
    }


@router.get("/metrics", response_model=None)
async def metrics(services: ServicesOf) -> Response:
    """Prometheus metrics."""
    return Response(
        services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.get("/admin/metrics", response_model=None)
async def metrics_since(services: ServicesOf, caller: Admin, since: str = "24h") -> dict[str, JSON]:
    """The six metrics since a time, or for a duration until now."""
    try:
        at = economics.moment_of(since, services.clock.now())
    except ValueError as error:
        raise InvalidRequest(str(error), param="since") from error
    policies = services.policies
    found = await quality.measured(
        services.store, policies.current.policies, policies.calibrators, at
    )
    return quality.shown(found, at)


@router.get("/admin/economics", response_model=None)
async def economics_since(
    services: ServicesOf, caller: Admin, since: str = "24h"
) -> dict[str, JSON]:
    """What rules, judges and people did and cost since a time, or for a duration until now."""
    try:
        at = economics.moment_of(since, services.clock.now())
    except ValueError as error:
        raise InvalidRequest(str(error), param="since") from error
    found = await services.store.economics(at)
    return economics.shown(found, at, services.settings.review.usd_per_minute)
