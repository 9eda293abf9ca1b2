"""What a route is given: the services, and a caller with the right role."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from gateway.auth import Caller
from gateway.records import Role
from gateway.services import Services


def _services(request: Request) -> Services:
    services: Services = request.state.services
    return services


ServicesOf = Annotated[Services, Depends(_services)]


async def _caller(request: Request, services: ServicesOf) -> Caller:
    headers = request.headers
    return await services.authenticator.caller(
        headers.get("authorization"), origin=headers.get("origin"), host=headers.get("host", "")
    )


AnyCaller = Annotated[Caller, Depends(_caller)]


def _reviewer(caller: AnyCaller) -> Caller:
    caller.require(Role.REVIEWER)
    return caller


Reviewer = Annotated[Caller, Depends(_reviewer)]


def _admin(caller: AnyCaller) -> Caller:
    caller.require(Role.ADMIN)
    return caller


Admin = Annotated[Caller, Depends(_admin)]
