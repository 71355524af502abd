"""gRPC without a network: channels whose calls run the servicer's own methods in this process.

Messages are handed over as they are. What a call costs is `latency`, in seconds, before the method begins and before a
unary answer comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]

from kvmesh.errors import Unavailable

_OK = grpc.StatusCode.OK
_END = object()


class _Context:
    """What a servicer's method sees of a call."""

    def __init__(self, call: _Call, metadata: Iterable[tuple[str, Any]] | None, timeout: float | None) -> None:
        self._call = call
        self._metadata = tuple(metadata or ())
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    async def write(self, message: Any) -> None:
        self._call.deliver(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, Any]] = ()
    ) -> None:
        self._call.status = (code, details)
        self._call.trailing = grpc.aio.Metadata(*trailing_metadata)
        raise grpc.aio.AbortError

    def cancelled(self) -> bool:
        return self._call.cancelled()

    def done(self) -> bool:
        return self._call.done()


class _Call(AsyncIterator[Any]):
    """A running call, of any of gRPC's kinds."""

    def __init__(
        self,
        method: Callable[[Any, Any], Any],
        request: Any,
        timeout: float | None,
        metadata: Iterable[tuple[str, Any]] | None,
        latency: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.trailing = grpc.aio.Metadata()
        self._latency = latency
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._cancelled = False
        context = _Context(self, metadata, timeout)
        self._task = loop.create_task(self._run(method, self._requests() if request is _END else request, context))
        self._timer = None if timeout is None else loop.call_later(max(0.0, timeout), self._late)
        self._task.add_done_callback(self._over)

    async def _run(self, method: Callable[[Any, Any], Any], request: Any, context: _Context) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)
        answer = await method(request, context)
        if answer is not None:
            if self._latency:
                await asyncio.sleep(self._latency)
            self.deliver(answer)

    async def _requests(self) -> AsyncIterator[Any]:
        while (message := await self._sent.get()) is not _END:
            yield message

    def _late(self) -> None:
        self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        if not self._task.done() and self.status is None:
            self.status = (code, details)
            self._task.cancel()

    def _over(self, task: asyncio.Task[None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.status is None:
            if task.cancelled():
                self.status = (grpc.StatusCode.CANCELLED, "the method was cancelled")
            elif (error := task.exception()) is not None:
                self.status = (grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}")
            else:
                self.status = (_OK, "")
        elif not task.cancelled():
            task.exception()
        self._answers.put_nowait(_END)

    def deliver(self, message: Any) -> None:
        self._answers.put_nowait(message)

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._task.done()

    def cancel(self) -> bool:
        if self._task.done():
            return False
        self._cancelled = True
        self._end(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        self._answers.put_nowait(_END)
        return True

    async def read(self) -> Any:
        message = await self._answers.get()
        if message is not _END:
            return message
        self._answers.put_nowait(_END)
        if self._cancelled:
            raise asyncio.CancelledError
        if not self._task.done():
            await asyncio.wait({self._task})
        code, details = self.status or (_OK, "")
        if code is not _OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), self.trailing, details, "")
        return EOF

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is EOF:
            raise StopAsyncIteration
        return message

    def __await__(self) -> Any:
        return self._unary().__await__()

    async def _unary(self) -> Any:
        try:
            answer = await self.read()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return answer

    async def write(self, message: Any) -> None:
        if self._task.done():
            raise asyncio.InvalidStateError("the call is over")
        self._sent.put_nowait(message)

    async def done_writing(self) -> None:
        self._sent.put_nowait(_END)

    async def code(self) -> grpc.StatusCode:
        await asyncio.wait({self._task})
        return (self.status or (_OK, ""))[0]

    async def details(self) -> str:
        await asyncio.wait({self._task})
        return (self.status or (_OK, ""))[1]


class _Channel:
    """As much of grpc.aio.Channel as generated stubs use."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._calls: set[_Call] = set()

    def unary_unary(self, path: str, *_serializers: Any, **_options: Any) -> Callable[..., _Call]:
        """A method of one request and one answer; so are the other kinds."""
        name = path.rpartition("/")[2]

        def call(request: Any = _END, *, timeout: float | None = None, metadata: Any = None, **_more: Any) -> _Call:
            method = self._network.method(self._address, name)
            made = _Call(method, request, timeout, metadata, self._network.latency)
            self._calls.add(made)
            made._task.add_done_callback(lambda _: self._calls.discard(made))
            return made

        return call

    unary_stream = stream_stream = stream_unary = unary_unary

    async def close(self, grace: float | None = None) -> None:
        """Ends what runs on it."""
        for call in list(self._calls):
            call.cancel()


class Network:
    """Servicers by address."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self._servicers: dict[str, Any] = {}

    def serve(self, address: str, servicer: Any) -> None:
        """Answers calls to that address."""
        self._servicers[address] = servicer

    def leave(self, address: str) -> None:
        """Nobody answers there any more."""
        self._servicers.pop(address, None)

    def method(self, address: str, name: str) -> Callable[[Any, Any], Any]:
        """What serves a call; without anybody there, what fails it as gRPC would."""
        servicer = self._servicers.get(address)
        return _nobody if servicer is None else getattr(servicer, name)

    def channel(self, address: str) -> grpc.aio.Channel:
        """As kvmesh.grpcx.channel."""
        return _Channel(self, address)  # type: ignore[return-value]


async def _nobody(_request: Any, context: _Context) -> None:
    error = Unavailable("nobody answers there")
    await context.abort(error.code, str(error))
