"""Clients of a mesh: what a program imports to talk to a router.

    with Client("127.0.0.1:7000") as client:
        answer = client.generate("Once upon a time", max_new_tokens=32, temperature=0, strategy="prefill_decode")
        for delta in answer:
            print(delta.text, end="")
        print(answer.result.ttft_seconds)

`AsyncClient` is the same with `async with`, `async for` and `await`. Failures are kvmesh.errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from kvmesh import errors, grpcx
from kvmesh.errors import InvalidArgument, MeshError, Unavailable
from kvmesh.tls import Tls
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.common_pb2 import FinishReason, GenerateUsage, SamplingParams
from kvmesh.v1.router_pb2_grpc import RouterStub

# Seconds that calls other than generate may take.
CALL_TIMEOUT = 10.0

__all__ = ["Answer", "AsyncAnswer", "AsyncClient", "Client", "Delta", "Result"]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What appeared since the delta before: whole characters, and the tokens behind them."""

    text: str
    token_ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished request."""

    request_id: str
    strategy: str
    # 0 when the request named its strategy.
    strategy_revision: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    # "stop_token", "stop_string", "length" or "abort".
    reason: str
    # The stop token or stop string that ended it.
    matched: int | str | None
    usage: GenerateUsage
    ttft_seconds: float
    tpot_seconds: float
    jct_seconds: float
    shares: list[pb.EngineShare]
    attempts: int
    trace_id: str


class _Collector:
    """Turns the messages of one stream into deltas, and into the result."""

    def __init__(self) -> None:
        self.started = pb.GenerateStarted()
        self.seen: list[Delta] = []
        self.done: pb.GenerateDone | None = None

    def take(self, message: pb.GenerateResponse) -> Delta | None:
        match message.WhichOneof("event"):
            case "started":
                self.started = message.started
            case "done":
                self.done = message.done
            case "delta":
                part = message.delta
                self.seen.append(Delta(part.text, list(part.token_ids), list(part.logprobs)))
                return self.seen[-1]
        return None

    def result(self) -> Result:
        if self.done is None:
            raise errors.FailedPrecondition("the answer is not complete: iterate to its end first")
        done = self.done
        matched = done.WhichOneof("matched")
        return Result(
            request_id=self.started.request_id,
            strategy=self.started.strategy,
            strategy_revision=self.started.strategy_revision,
            text="".join(d.text for d in self.seen),
            token_ids=[t for d in self.seen for t in d.token_ids],
            logprobs=[p for d in self.seen for p in d.logprobs],
            reason=FinishReason.Name(done.reason).removeprefix("FINISH_REASON_").lower(),
            matched=getattr(done, matched) if matched else None,
            usage=done.usage,
            ttft_seconds=done.ttft_seconds,
            tpot_seconds=done.tpot_seconds,
            jct_seconds=done.jct_seconds,
            shares=list(done.shares),
            attempts=done.attempts,
            trace_id=done.trace_id,
        )


class Answer:
    """A running request: iterate for its deltas; then `result` is there."""

    def __init__(self, call: Any, translate: Callable[[grpc.RpcError], MeshError]) -> None:
        self._call = call
        self._translate = translate
        self._collector = _Collector()

    def __iter__(self) -> Iterator[Delta]:
        try:
            for message in self._call:
                if (delta := self._collector.take(message)) is not None:
                    yield delta
        except grpc.RpcError as error:
            raise self._translate(error) from None
        finally:
            self.cancel()
        if self._collector.done is None:
            raise Unavailable("the router ended the answer before it was complete")

    @property
    def started(self) -> pb.GenerateStarted:
        """Request id, strategy and prompt length; empty before the first delta."""
        return self._collector.started

    @property
    def result(self) -> Result:
        """The finished request. Raises FailedPrecondition before the end."""
        return self._collector.result()

    def wait(self) -> Result:
        """Takes the rest of the answer and returns the result."""
        for _ in self:
            pass
        return self.result

    def cancel(self) -> None:
        """Gives the request up; nothing once it is over."""
        self._call.cancel()


class AsyncAnswer:
    """A running request: iterate for its deltas; then `result` is there."""

    def __init__(self, call: Any, translate: Callable[[grpc.RpcError], MeshError]) -> None:
        self._call = call
        self._translate = translate
        self._collector = _Collector()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for message in self._call:
                if (delta := self._collector.take(message)) is not None:
                    yield delta
        except grpc.RpcError as error:
            raise self._translate(error) from None
        finally:
            self.cancel()
        if self._collector.done is None:
            raise Unavailable("the router ended the answer before it was complete")

    @property
    def started(self) -> pb.GenerateStarted:
        """Request id, strategy and prompt length; empty before the first delta."""
        return self._collector.started

    @property
    def result(self) -> Result:
        """The finished request. Raises FailedPrecondition before the end."""
        return self._collector.result()

    async def wait(self) -> Result:
        """Takes the rest of the answer and returns the result."""
        async for _ in self:
            pass
        return self.result

    def cancel(self) -> None:
        """Gives the request up; nothing once it is over."""
        self._call.cancel()


class Client:
    """A blocking client of the router at `address` (HOST:PORT). Threads may share it.

    `tls` is for a mesh with TLS, `api_key` for a router that asks for keys.
    """

    def __init__(self, address: str, *, tls: Tls | None = None, api_key: str = "") -> None:
        self.address = address
        grpcx.split_address(address)
        self._metadata = authorization(api_key)
        self._channel = grpcx.blocking_channel(address, tls)
        self._stub: Any = RouterStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it what runs on it."""
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        strategy: str = "",
        strategy_params: Mapping[str, object] | None = None,
        request_id: str = "",
        model: str = "",
        session: str = "",
        tenant: str = "",
        priority: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """Starts a request: text or token ids, the fields of SamplingParams by name, and seconds until it must be over.

        Raises InvalidArgument for a field that cannot be sent; what the router finds wrong comes while iterating.
        """
        request = _request(prompt, strategy, strategy_params, request_id, model, sampling)
        _on_account(request, session, tenant, priority)
        return Answer(self._stub.Generate(request, timeout=timeout, metadata=self._metadata), self._translate)

    def strategies(self) -> list[pb.StrategyInfo]:
        """All strategies that the router knows, with their parameters."""
        return list(self._call("ListStrategies", pb.ListStrategiesRequest()).strategies)

    def strategy(self) -> pb.StrategyChoice:
        """The strategy in force."""
        return self._call("GetStrategy", pb.GetStrategyRequest()).strategy  # type: ignore[no-any-return]

    def strategies_in_force(self) -> pb.GetStrategyResponse:
        """The strategy in force, the one on trial, and those before."""
        return self._call("GetStrategy", pb.GetStrategyRequest())  # type: ignore[no-any-return]

    def set_strategy(
        self,
        name: str,
        params: Mapping[str, object] | None = None,
        *,
        share_percent: float = 0,
        max_error_rate: float = 0,
        max_ttft_seconds: float = 0,
        min_requests: int = 0,
    ) -> pb.StrategyChoice:
        """Puts a strategy in force for requests to come, or on trial for a share of the sessions.

        The bounds, where they are not 0, make it be taken back when it passes them, judged from `min_requests` requests
        on (0: 20). Raises NotFound, InvalidArgument.
        """
        request = _choice(name, params, share_percent, max_error_rate, max_ttft_seconds, min_requests)
        return self._call("SetStrategy", request).strategy  # type: ignore[no-any-return]

    def rollback_strategy(self) -> pb.StrategyChoice:
        """Ends the trial, else puts the choice before in force again. Raises FailedPrecondition."""
        return self._call("SetStrategy", pb.SetStrategyRequest(rollback=True)).strategy  # type: ignore[no-any-return]

    def mesh(self) -> pb.GetMeshResponse:
        """The mesh as the router sees it now."""
        return self._call("GetMesh", pb.GetMeshRequest())  # type: ignore[no-any-return]

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=CALL_TIMEOUT, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def _translate(self, error: grpc.RpcError) -> MeshError:
        return _translate(error, self.address)


class AsyncClient:
    """An asyncio client of the router at `address` (HOST:PORT). `tls` and `api_key` as Client's."""

    def __init__(self, address: str, *, tls: Tls | None = None, api_key: str = "") -> None:
        self.address = address
        grpcx.split_address(address)
        self._metadata = authorization(api_key)
        self._channel = grpcx.channel(address, tls)
        self._stub: Any = RouterStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and with it what runs on it."""
        await self._channel.close(None)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        strategy: str = "",
        strategy_params: Mapping[str, object] | None = None,
        request_id: str = "",
        model: str = "",
        session: str = "",
        tenant: str = "",
        priority: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncAnswer:
        """Starts a request: text or token ids, the fields of SamplingParams by name, and seconds until it must be over.

        Raises InvalidArgument for a field that cannot be sent; what the router finds wrong comes while iterating.
        """
        request = _request(prompt, strategy, strategy_params, request_id, model, sampling)
        _on_account(request, session, tenant, priority)
        return AsyncAnswer(self._stub.Generate(request, timeout=timeout, metadata=self._metadata), self._translate)

    async def strategies(self) -> list[pb.StrategyInfo]:
        """All strategies that the router knows, with their parameters."""
        return list((await self._call("ListStrategies", pb.ListStrategiesRequest())).strategies)

    async def strategy(self) -> pb.StrategyChoice:
        """The strategy in force."""
        return (await self._call("GetStrategy", pb.GetStrategyRequest())).strategy  # type: ignore[no-any-return]

    async def strategies_in_force(self) -> pb.GetStrategyResponse:
        """The strategy in force, the one on trial, and those before."""
        return await self._call("GetStrategy", pb.GetStrategyRequest())  # type: ignore[no-any-return]

    async def set_strategy(
        self,
        name: str,
        params: Mapping[str, object] | None = None,
        *,
        share_percent: float = 0,
        max_error_rate: float = 0,
        max_ttft_seconds: float = 0,
        min_requests: int = 0,
    ) -> pb.StrategyChoice:
        """Puts a strategy in force for requests to come, or on trial for a share of the sessions.

        The bounds, where they are not 0, make it be taken back when it passes them, judged from `min_requests` requests
        on (0: 20). Raises NotFound, InvalidArgument.
        """
        request = _choice(name, params, share_percent, max_error_rate, max_ttft_seconds, min_requests)
        return (await self._call("SetStrategy", request)).strategy  # type: ignore[no-any-return]

    async def rollback_strategy(self) -> pb.StrategyChoice:
        """Ends the trial, else puts the choice before in force again. Raises FailedPrecondition."""
        return (await self._call("SetStrategy", pb.SetStrategyRequest(rollback=True))).strategy  # type: ignore[no-any-return]

    async def mesh(self) -> pb.GetMeshResponse:
        """The mesh as the router sees it now."""
        return await self._call("GetMesh", pb.GetMeshRequest())  # type: ignore[no-any-return]

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=CALL_TIMEOUT, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def _translate(self, error: grpc.RpcError) -> MeshError:
        return _translate(error, self.address)


def authorization(api_key: str) -> tuple[tuple[str, str], ...] | None:
    """gRPC metadata that shows an API key; None for an empty one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else None


def _request(
    prompt: str | Sequence[int],
    strategy: str,
    strategy_params: Mapping[str, object] | None,
    request_id: str,
    model: str,
    sampling: Mapping[str, Any],
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(request_id=request_id, strategy=strategy, model=model, sampling=_sampling(sampling))
    request.strategy_params.update(_texts(strategy_params))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        # Set even when empty: an empty prompt is the router's to refuse.
        request.tokens.SetInParent()
        for i, token in enumerate(prompt):
            try:
                request.tokens.ids.append(token)
            except (TypeError, ValueError):
                raise InvalidArgument(f"token_ids[{i}] = {token!r} is not between 0 and 2^32 - 1") from None
    return request


def _on_account(request: pb.GenerateRequest, session: str, tenant: str, priority: str) -> None:
    request.session, request.tenant = session, tenant
    if priority:
        try:
            request.priority = pb.Priority.Value(f"PRIORITY_{priority.upper()}")
        except ValueError:
            raise InvalidArgument(f"priority = {priority!r} is not low, normal or high") from None


def _sampling(fields: Mapping[str, Any]) -> SamplingParams:
    params = SamplingParams()
    for name, value in fields.items():
        if name not in SamplingParams.DESCRIPTOR.fields_by_name:
            raise InvalidArgument(f"sampling has no field {name!r}; it has {', '.join(_sampling_fields())}")
        if value is None:
            continue
        try:
            params.MergeFrom(SamplingParams(**{name: value}))
        except (TypeError, ValueError, OverflowError):
            raise InvalidArgument(f"sampling.{name} = {value!r} cannot be sent: wrong type, or out of range") from None
    return params


def _sampling_fields() -> list[str]:
    return sorted(SamplingParams.DESCRIPTOR.fields_by_name)


def _choice(
    name: str,
    params: Mapping[str, object] | None,
    share_percent: float,
    max_error_rate: float,
    max_ttft_seconds: float,
    min_requests: int,
) -> pb.SetStrategyRequest:
    try:
        request = pb.SetStrategyRequest(name=name, params=_texts(params), share_percent=share_percent)
        if max_error_rate or max_ttft_seconds or min_requests:
            request.guard.max_error_rate = max_error_rate
            request.guard.max_ttft_seconds = max_ttft_seconds
            request.guard.min_requests = min_requests
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the change cannot be sent: {error}") from None
    return request


def _texts(params: Mapping[str, object] | None) -> dict[str, str]:
    """Values as a strategy's parameters are written: true and false in lower case."""
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in (params or {}).items()}


def _translate(error: grpc.RpcError, address: str) -> MeshError:
    code = error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable(f"what listens at {address} is no kvmesh router")
    if code is grpc.StatusCode.UNAVAILABLE and _never_connected(error):
        return Unavailable(f"no kvmesh router answers at {address}")
    return errors.from_rpc(error)  # type: ignore[arg-type]


def _never_connected(error: grpc.RpcError) -> bool:
    """Whether the status was made on this side: gRPC's own texts, which no kvmesh service sends."""
    details = error.details() or ""
    texts = ("failed to connect", "onnection refused", "Socket closed", "errors resolving", "DNS resolution failed")
    return any(text in details for text in texts)
