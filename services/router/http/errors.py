"""Failures as OpenAI's error objects."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from kvmesh.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

# (HTTP status, OpenAI's type).
_KINDS: dict[type[MeshError], tuple[int, str]] = {
    InvalidArgument: (400, "invalid_request_error"),
    FailedPrecondition: (409, "invalid_request_error"),
    AlreadyExists: (409, "invalid_request_error"),
    NotFound: (404, "invalid_request_error"),
    Unauthenticated: (401, "authentication_error"),
    PermissionDenied: (403, "permission_error"),
    ResourceExhausted: (429, "rate_limit_error"),
    Unimplemented: (501, "invalid_request_error"),
    Cancelled: (499, "server_error"),
    Aborted: (503, "server_error"),
    Unavailable: (503, "server_error"),
    DeadlineExceeded: (504, "timeout_error"),
}
RETRY_AFTER_S = 1


def error_object(error: MeshError) -> dict[str, Any]:
    """`{"error": {message, type, code, param}}`; `code` is the gRPC status."""
    _, kind = _KINDS.get(type(error), (500, "server_error"))
    # What the client sent may be no Unicode, and stand in the message.
    message = str(error).encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": error.status.lower()}}


def error_response(error: MeshError) -> JSONResponse:
    """The whole answer, with a hint when to come again where that may help."""
    status, _ = _KINDS.get(type(error), (500, "server_error"))
    wait = RETRY_AFTER_S if error.retry_after is None else math.ceil(error.retry_after)
    headers = {"retry-after": str(wait)} if status in (429, 503) else None
    return JSONResponse(error_object(error), status, headers)
