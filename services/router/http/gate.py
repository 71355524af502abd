"""What every HTTP request passes before the routes: its size, and its API key."""

from __future__ import annotations

from typing import Any, TypeAlias

from kvmesh.apikeys import ADMIN, GENERATE, ApiKey, ApiKeys
from kvmesh.errors import MeshError, ResourceExhausted, Unauthenticated
from services.router.http.errors import error_response

Scope: TypeAlias = Any

# The static page and the description of the API hold nothing of the mesh.
OPEN = frozenset(
    ("/", "/dashboard.js", "/dashboard.css", "/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
)
GENERATING = frozenset(("/v1/models", "/v1/completions", "/v1/chat/completions"))


class TooLarge(ResourceExhausted):
    """A body over the limit."""


class Gate:
    """ASGI middleware. Without `keys` anybody may call; `state.caller` of a request is its key."""

    def __init__(self, app: Any, keys: ApiKeys | None, body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Lets the request through, or answers it with an error object."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            key = self._key(scope["path"], headers.get(b"authorization", ""))
            if key is not None:
                scope.setdefault("state", {})["caller"] = Caller(self._keys, key)
            body = await self._body(headers.get(b"content-length", ""), receive)
        except TooLarge as error:
            return await _answer(error, 413, scope, receive, send)
        except MeshError as error:
            return await _answer(error, None, scope, receive, send)
        await self._app(scope, body, send)

    def _key(self, path: str, authorization: str) -> ApiKey | None:
        if self._keys is None or path in OPEN:
            return None
        key = self._keys.find(authorization)
        key.check(GENERATE if path in GENERATING else ADMIN, path)
        return key

    async def _body(self, length: str, receive: Any) -> Any:
        """`receive`, with the body read already. Raises TooLarge."""
        limit = self._body_bytes
        too_large = TooLarge(f"the body is larger than {limit} bytes")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        messages: list[Any] = []
        taken, more = 0, True
        while more:
            message = await receive()
            messages.append(message)
            taken += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            if taken > limit:
                raise too_large

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        return replay


class Caller:
    """Whose key it is, and how many requests it may still start."""

    def __init__(self, keys: ApiKeys | None, key: ApiKey) -> None:
        self._keys = keys
        self._key = key

    def running(self, count: int) -> Any:
        """Held while `count` of its requests run. Raises ResourceExhausted."""
        assert self._keys is not None
        return self._keys.running(self._key, count)


async def _answer(error: MeshError, status: int | None, scope: Scope, receive: Any, send: Any) -> None:
    response = error_response(error)
    if status is not None:
        response.status_code = status
    if isinstance(error, Unauthenticated):
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)
