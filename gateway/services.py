"""What every part of the HTTP surface is given: the use cases, and the ports beneath them."""

from __future__ import annotations

import msgspec

from gateway.auth import Authenticator
from gateway.delivery import Delivery
from gateway.interviews import Interviewer
from gateway.pipeline import Pipeline
from gateway.ports import Bus, Clock, LivePolicies, Models, Store
from gateway.reviews import Reviews, WaitingRoom
from gateway.settings import Settings
from gateway.telemetry import Metrics


class Services(msgspec.Struct, frozen=True):
    """Everything a request handler may use."""

    settings: Settings
    store: Store
    bus: Bus
    models: Models
    clock: Clock
    metrics: Metrics
    policies: LivePolicies
    authenticator: Authenticator
    interviewer: Interviewer
    pipeline: Pipeline
    delivery: Delivery
    reviews: Reviews
    room: WaitingRoom
