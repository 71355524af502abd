"""Random calls of every gRPC method of a mesh, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from contextlib import suppress
from typing import Any

import grpc
from fuzz_messages import Maker
from google.protobuf import message_factory
from google.protobuf.message import Message
from secure_harness import SERVICES, SecureMesh, methods

from kvmesh.client import authorization
from kvmesh.grpcx import channel
from kvmesh.v1 import common_pb2, engine_pb2, kv_pb2, kv_pb2_grpc, registry_pb2, registry_pb2_grpc, router_pb2

# What no caller may bring about.
BAD = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)
# What the client's own library says when it writes to a call that has been refused already.
OWN = "Internal error from Core"
# These take members out of the mesh: last.
LEAVING = ("Leave", "Drain")
STRATEGIES = ("data_parallel", "prefill_decode", "balanced_prefill_decode", "adaptive", "store_backed", "none")
AT_ONCE = 8


class Fuzzer:
    """Calls `mesh`; `seen` counts (method, status), `bad` holds what must not be."""

    def __init__(self, mesh: SecureMesh, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen: Counter[tuple[str, str]] = Counter()
        self.bad: list[str] = []
        self._mesh = mesh
        self._maker = Maker(self.rng, self._known)
        self._tickets: deque[common_pb2.Ticket] = deque(maxlen=5000)
        self._leases: list[str] = []
        self._writes: set[tuple[str, str, int]] = set()
        servers = {"registry": ["registry"], "engine": ["engine", "engine-1"], "kvstore": ["kvstore"]}
        servers["router"] = ["router"]
        self._targets = [
            (address, method)
            for server, addresses in servers.items()
            for address in addresses
            for service in SERVICES[server]
            for method in methods(service)
        ]
        self._channels: dict[str, Any] = {}

    async def __aenter__(self) -> Fuzzer:
        names = {name for name, _ in self._targets}
        self._channels = {n: channel(self._mesh.addresses[n], self._mesh.tls("service")) for n in names}
        return self

    async def __aexit__(self, *error: Any) -> None:
        for ch in self._channels.values():
            await ch.close(None)

    def _known(self, field: Any) -> Any:
        """A value that makes sense."""
        rng = self.rng
        members = ("engine", "engine-1", "kvstore", "router")
        made: dict[str, Any] = {
            "token_ids": lambda: self._tokens(),
            "ids": lambda: self._tokens(),
            "ticket": lambda: rng.choice(self._tickets) if self._tickets else None,
            "model": lambda: "tiny",
            "name": lambda: rng.choice((*members, "fuzz", *STRATEGIES)),
            "engine": lambda: rng.choice(members),
            "source": lambda: rng.choice(members),
            "target": lambda: rng.choice(members),
            "strategy": lambda: rng.choice(STRATEGIES) if field.message_type is None else None,
            "address": lambda: f"127.0.0.1:{rng.choice((1, 2, 3))}",
            "incarnation": lambda: f"{rng.getrandbits(128):032x}",
            "sender_incarnation": lambda: rng.choice(sorted(self._writes))[1] if self._writes else None,
            "lease_id": lambda: rng.choice(self._leases) if self._leases else None,
            "key": lambda: rng.choice(("strategy", "fuzz", "draining", "a/b")),
            "value": lambda: self._setting() if field.type == field.TYPE_STRING else None,
            "begin": lambda: rng.choice((0, 0, 1, 8, -1)) if field.message_type is None else None,
            "end": lambda: rng.choice((-1, -1, 1, 8, 16)),
            "ttl_ms": lambda: rng.choice((0, 1000, 5000, 600000)),
            "wait_ms": lambda: rng.choice((0, 10, 600000)),
            "interval_ms": lambda: rng.choice((0, 20, 1000)),
            "max_new_tokens": lambda: rng.choice((1, 2, 20, 5000)),
            "stop": lambda: False,
            "count": lambda: rng.choice((1, 10, 1000)),
            "hottest": lambda: rng.choice((1, 3)),
            "temperature": lambda: rng.choice((0.0, 1.0)),
        }
        found = made.get(field.name)
        if found is None:
            return None
        value = found()
        return None if field.is_repeated != isinstance(value, list) else value

    def _tokens(self) -> list[int]:
        length = self.rng.choice((1, 2, 9, 17, 80, 300))
        begin = self.rng.randrange(4)
        return [(begin * 31 + i * 7) % 384 for i in range(length)]

    def _setting(self) -> str:
        rng = self.rng
        choice = {"name": rng.choice(STRATEGIES), "params": rng.choice(({}, {"ratio": "x"}, [], None, "p"))}
        if rng.random() < 0.5:
            choice["trial"] = rng.choice(({**choice, "share": 50}, {"share": "x"}, 7))
        return rng.choice((json.dumps(choice), "{", "null", "[]", "7", '"x"', "\x01", json.dumps({"name": {}})))

    def _request(self, method: Any) -> tuple[bytes, Message]:
        """(what is sent, what it was made of)."""
        message = self._template(method) if self.rng.random() < 0.6 else None
        if message is None:
            message = self._maker.message(method.input_type)
        elif self.rng.random() < 0.6:
            self._maker.mutate(message)
        content = message.SerializeToString()
        if self.rng.random() < 0.06:
            return self._maker.garbage(content), message
        return content, message

    def _template(self, method: Any) -> Message | None:
        """A message that would be right, where there is more to it than chance finds."""
        tokens = self._tokens()
        ticket = self.rng.choice(self._tickets) if self._tickets else None
        short = common_pb2.SamplingParams(max_new_tokens=self.rng.choice((1, 5, 50)))
        made: dict[str, Any] = {
            "PrepRecv": kv_pb2.PrepRecvRequest(token_ids=tokens, end=-1, ttl_ms=self.rng.choice((100, 2000, 600000))),
            "RemoteSend": kv_pb2.RemoteSendRequest(token_ids=tokens, end=-1, ticket=ticket),
            "Release": kv_pb2.ReleaseRequest(ticket=ticket),
            "StartGenerate": engine_pb2.StartGenerateRequest(token_ids=tokens, sampling=short),
            "Generate": router_pb2.GenerateRequest(
                tokens=router_pb2.TokenIds(ids=tokens), sampling=short, strategy=self.rng.choice(("", *STRATEGIES))
            ),
            "Register": registry_pb2.RegisterRequest(
                member=registry_pb2.Member(
                    endpoint=common_pb2.Endpoint(
                        name=self.rng.choice(("fuzz-a", "fuzz-b", "engine-1")),
                        address="127.0.0.1:1",
                        incarnation=f"{self.rng.getrandbits(128):032x}",
                    ),
                    kind=self.rng.choice((1, 2, 3)),
                )
            ),
            "SetStrategy": router_pb2.SetStrategyRequest(name=self.rng.choice(STRATEGIES), share_percent=0),
        }
        if method.name == "StartGenerate" and ticket is not None and self.rng.random() < 0.5:
            made["StartGenerate"].ticket.CopyFrom(ticket)
            made["StartGenerate"].begin = ticket.matched
        if method.name == "Write" and ticket is not None:
            begin = kv_pb2.WriteBegin(
                ticket=ticket, begin=ticket.matched, end=ticket.end, write_id=self.rng.randint(1, 9)
            )
            begin.sender.name, begin.sender.incarnation = "fuzz", f"{self.rng.getrandbits(8):032x}"
            made["Write"] = kv_pb2.WriteRequest(begin=begin)
        return made.get(method.name)

    async def run(self, seconds: float, leaving: bool) -> None:
        """Calls for so long, several at once."""
        wanted = [t for t in self._targets if (t[1].name in LEAVING) == leaving]
        until = asyncio.get_running_loop().time() + seconds

        async def caller() -> None:
            while asyncio.get_running_loop().time() < until:
                await self._one(*self.rng.choice(wanted))

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))

    async def _one(self, server: str, method: Any) -> None:
        content, message = self._request(method)
        sends = [content]
        if method.client_streaming:
            sends = [content, *(self._request(method)[0] for _ in range(self.rng.choice((0, 0, 1, 2))))]
            self._remember_write(server, sends)
        kind = (
            ("stream" if method.client_streaming else "unary")
            + "_"
            + ("stream" if method.server_streaming else "unary")
        )
        answer = message_factory.GetMessageClass(method.output_type)
        path = f"/{method.containing_service.full_name}/{method.name}"
        make = getattr(self._channels[server], kind)(path, response_deserializer=answer.FromString)
        # A ticket whose answer was never read stays for its time: here all are given back.
        ticket = method.name == "PrepRecv"
        patience = 30.0 if ticket else self.rng.choice((0.02, 0.2, 0.5))
        call = make(
            iter(sends) if method.client_streaming else content,
            timeout=self.rng.choice((2.0,) if ticket else (0.1, 0.5, 2.0)),
            metadata=authorization(self._mesh.keys["admin"]),
        )
        try:
            async with asyncio.timeout(patience):
                await self._read(call, method, server)
                code, details = await call.code(), await call.details()
        except TimeoutError:
            code, details = None, ""
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        finally:
            call.cancel()
        self.seen[method.full_name, "left" if code is None else code.name] += 1
        if code in BAD and details != OWN:
            self.bad.append(f"{method.full_name}: {code.name}: {details}; {str(message)[:500]}")

    async def _read(self, call: Any, method: Any, server: str) -> None:
        if not method.server_streaming:
            self._remember(await call, server)
            return
        for _ in range(50):
            if await call.read() is grpc.aio.EOF:
                return
        call.cancel()

    def _remember(self, answer: Any, server: str) -> None:
        if isinstance(answer, kv_pb2.PrepRecvResponse):
            self._tickets.append(answer.ticket)
        elif isinstance(answer, registry_pb2.RegisterResponse):
            self._leases.append(answer.lease_id)

    def _remember_write(self, server: str, sends: list[bytes]) -> None:
        for content in sends:
            with suppress(Exception):
                begin = kv_pb2.WriteRequest.FromString(content).begin
                self._writes.add((server, begin.sender.incarnation, begin.write_id))

    async def tidy(self) -> None:
        """What callers owe at their end: tickets are given back, writers say that they have stopped."""
        registry = registry_pb2_grpc.RegistryStub(self._channels["registry"])
        for lease in self._leases:
            with suppress(grpc.aio.AioRpcError):
                await registry.Deregister(registry_pb2.DeregisterRequest(lease_id=lease), timeout=2)
        for server, incarnation, number in self._writes:
            peer = kv_pb2_grpc.KvPeerStub(self._channels[server])
            await peer.Stopped(kv_pb2.StoppedRequest(sender_incarnation=incarnation, write_id=number), timeout=2)
        for ticket in self._tickets:
            with suppress(grpc.aio.AioRpcError):
                endpoint = kv_pb2_grpc.KvEndpointStub(self._channels[ticket.receiver.name])
                await endpoint.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=2)
