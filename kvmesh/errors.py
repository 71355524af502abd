"""Failures with a gRPC status: raised anywhere, carried over the wire, and raised again on the other side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import grpc


# Trailing metadata of a failed call.
TOLD, RETRY_AFTER = "kvmesh-told", "retry-after-ms"


class MeshError(Exception):
    """Base of all; by itself, a failure of unknown kind. The text is for the client: it names field and value."""

    # Name of the grpc.StatusCode, so that nobody needs grpc to raise one.
    status: ClassVar[str] = "UNKNOWN"
    # Seconds after which the same call may go better; None: not known. Travels as metadata `retry-after-ms`.
    retry_after: float | None = None
    # Whether the service called has said so itself, and not gRPC on the way to it.
    told: bool = False

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        import grpc

        return grpc.StatusCode[self.status]


class Cancelled(MeshError):
    """The caller gave up, or what the call was part of is over."""

    status = "CANCELLED"


class InvalidArgument(MeshError):
    """The request is wrong, whatever the state of the system."""

    status = "INVALID_ARGUMENT"


class DeadlineExceeded(MeshError):
    """Time was up first."""

    status = "DEADLINE_EXCEEDED"


class NotFound(MeshError):
    """There is no such thing."""

    status = "NOT_FOUND"


class AlreadyExists(MeshError):
    """There is one already."""

    status = "ALREADY_EXISTS"


class PermissionDenied(MeshError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class Unauthenticated(MeshError):
    """It is not known who calls."""

    status = "UNAUTHENTICATED"


class ResourceExhausted(MeshError):
    """There is no room for it."""

    status = "RESOURCE_EXHAUSTED"


class FailedPrecondition(MeshError):
    """Not in the state that things are in; the same call again fails too, until somebody changes that."""

    status = "FAILED_PRECONDITION"


class Aborted(MeshError):
    """Somebody else was first; start again from reading."""

    status = "ABORTED"


class DataLoss(MeshError):
    """Data that is there is not what it should be."""

    status = "DATA_LOSS"


class Unimplemented(MeshError):
    """The other side cannot do this."""

    status = "UNIMPLEMENTED"


class Internal(MeshError):
    """A bug."""

    status = "INTERNAL"


class Unavailable(MeshError):
    """The other side is away; a later try may succeed."""

    status = "UNAVAILABLE"


_KINDS: tuple[type[MeshError], ...] = (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
_BY_STATUS = {kind.status: kind for kind in _KINDS}


def from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> MeshError:
    """The MeshError of a failed call, blocking or asyncio; `peer`, who was called, begins its text."""
    status = error.code().name
    text = error.details() or status
    result = _BY_STATUS.get(status, MeshError)(f"{peer}: {text}" if peer else text)
    metadata: Any = error.trailing_metadata() or ()
    trailing = {key: value for key, value in metadata if isinstance(value, str)}
    result.told = TOLD in trailing
    if (hint := trailing.get(RETRY_AFTER, "")).isdigit():
        result.retry_after = int(hint) / 1000
    return result
