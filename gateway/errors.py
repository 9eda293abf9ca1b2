"""Errors for the caller, drawn as a tree and mapped once to the OpenAI error shape.

Bad answers are data (`CheckResult`); exceptions are for us, the caller, or the world::

    PolicyError(ValueError)         policies: a document is wrong; raised at load, never per request
    CalibrationError(ValueError)    policies: a calibrator file is wrong, or labels are too few
    SettingsError(ValueError)       gateway: holdgate.yaml or an environment variable is wrong; stops the start
    GatewayError                    has status, code, type: becomes {"error": {...}}
    ├─ InvalidRequest 400
    ├─ Unauthenticated 401
    ├─ Forbidden 403
    │  ├─ ResponseBlocked 403       a policy blocked the response
    │  └─ ResponseRejected 403      a person, or the deadline, rejected it
    ├─ NotFound 404
    ├─ Conflict 409                 already resolved, or the lease is lost (review API only)
    ├─ PayloadTooLarge 413
    ├─ ResponseHeld 423             waiting for a person
    ├─ HeadTooLarge 431
    ├─ UpstreamError 502
    │  └─ UpstreamTimeout 504
    └─ StoreError 503               the record could not be made durable; carries retry-after
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from validators import JSON


class SettingsError(ValueError):
    """A setting is wrong; the message names the file and line or the environment variable, and the mend."""


class GatewayError(Exception):
    """An answer in the OpenAI error shape.

    `extra` is added inside `error` (there the SDKs keep it as `exc.body`); `headers` to the response. `should_retry`
    becomes `x-should-retry`, which the stock clients obey; None leaves it to them.
    """

    status = 500
    code = "internal_error"
    type = "api_error"
    should_retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        extra: Mapping[str, JSON] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})
        if self.should_retry is not None:
            self.headers.setdefault("x-should-retry", str(self.should_retry).lower())

    def body(self) -> bytes:
        """The JSON body: {"error": {"message", "type", "code", "param", ...extra}}."""
        error = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        return orjson.dumps({"error": error | self.extra})


class InvalidRequest(GatewayError):
    """The request is malformed; asking again unchanged will not help."""

    status, code, type, should_retry = 400, "invalid_request", "invalid_request_error", False


class Unauthenticated(GatewayError):
    """No key, or one we do not know."""

    status, code, type, should_retry = 401, "invalid_api_key", "authentication_error", False


class Forbidden(GatewayError):
    """The key is known and its role does not allow this."""

    status, code, type, should_retry = 403, "forbidden", "permission_error", False


class ResponseBlocked(Forbidden):
    """The policy blocked the response."""

    code, type = "response_blocked", "policy_block"


class ResponseRejected(Forbidden):
    """A reviewer, or the hold's deadline, rejected the response."""

    code, type = "response_rejected", "policy_rejection"


class NotFound(GatewayError):
    """No such thing here."""

    status, code, type, should_retry = 404, "not_found", "invalid_request_error", False


class Conflict(GatewayError):
    """Somebody was first; `extra` says who and with what result."""

    status, code, type, should_retry = 409, "conflict", "conflict_error", False


class PayloadTooLarge(GatewayError):
    """The body is over the configured limit."""

    status, code, type, should_retry = 413, "request_too_large", "invalid_request_error", False


class ResponseHeld(GatewayError):
    """The response waits for a person; `extra["hold"]` says where to ask for it."""

    status, code, type, should_retry = 423, "response_held", "policy_hold", False


class HeadTooLarge(GatewayError):
    """The request line and headers are over the configured limit."""

    status, code, type, should_retry = 431, "headers_too_large", "invalid_request_error", False


class UpstreamError(GatewayError):
    """The provider could not be reached, or what it sent cannot be used."""

    status, code, type = 502, "upstream_error", "upstream_error"


class UpstreamTimeout(UpstreamError):
    """The provider did not answer in time."""

    status, code = 504, "upstream_timeout"


class StoreError(GatewayError):
    """The decision could not be made durable, so nothing is answered; asking again later may work."""

    status, code, type = 503, "store_unavailable", "api_error"

    def __init__(self, message: str, *, retry_after_s: int = 2) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after_s)})
