"""What operators and orchestrators ask: alive, ready, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response

from gateway import __version__
from gateway.api.depends import ServicesOf
from gateway.errors import StoreError
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
    try:
        await services.store.ping()
    except StoreError as error:
        store = error.message
        response.status_code = 503
    policies = services.policies.current
    return {
        "status": "ready" if store == "ok" else "not ready",
        "store": store,
        "policies": [policy.label for policy in policies.policies],
        "warnings": [str(problem) for problem in policies.warnings],
        "waiting": len(services.room),
    }


@router.get("/metrics", response_model=None)
async def metrics(services: ServicesOf) -> Response:
    """Prometheus metrics."""
    return Response(
        services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
