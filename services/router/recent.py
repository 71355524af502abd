"""What became of the last requests: for the dashboard, in bounded memory, without a word of any prompt."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from kvmesh.errors import Cancelled, MeshError
from kvmesh.v1.common_pb2 import FinishReason
from kvmesh.v1.router_pb2 import GenerateResponse

KEPT = 2000


@dataclasses.dataclass
class Record:
    """One request. Times in seconds, 0 when it did not get there; `status`: "running", "done" or a gRPC status."""

    request_id: str
    began_unix: float
    strategy: str = ""
    revision: int = 0
    status: str = "running"
    error: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft: float = 0.0
    tpot: float = 0.0
    jct: float = 0.0
    attempts: int = 0
    engines: tuple[str, ...] = ()
    sent_bytes: int = 0
    trace_id: str = ""

    def watching(
        self, write: Callable[[GenerateResponse], Awaitable[object]]
    ) -> Callable[[GenerateResponse], Awaitable[object]]:
        """`write`, with an eye on what goes through."""

        def watched(message: GenerateResponse) -> Awaitable[object]:
            self._see(message)
            return write(message)

        return watched

    def _see(self, message: GenerateResponse) -> None:
        match message.WhichOneof("event"):
            case "started":
                started = message.started
                self.strategy, self.revision = started.strategy, started.strategy_revision
                self.prompt_tokens = started.prompt_tokens
                self.trace_id = started.traceparent.split("-")[1] if started.traceparent else ""
            case "delta":
                self.completion_tokens += len(message.delta.token_ids)
                if not self.ttft and message.delta.token_ids:
                    self.ttft = time.time() - self.began_unix
            case "done":
                done = message.done
                self.reason = FinishReason.Name(done.reason).removeprefix("FINISH_REASON_").lower()
                self.ttft, self.tpot, self.jct = done.ttft_seconds, done.tpot_seconds, done.jct_seconds
                self.attempts, self.cached_tokens = done.attempts, done.usage.cached_tokens
                self.engines = tuple(share.engine for share in done.shares)
                self.sent_bytes = sum(share.sent_bytes for share in done.shares)
                self.status = "done"

    def failed(self, error: BaseException) -> None:
        """The request ended otherwise."""
        self.jct = time.time() - self.began_unix
        if isinstance(error, MeshError):
            self.status, self.error = error.status, str(error)
        else:
            self.status = Cancelled.status

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Recent:
    """The last KEPT requests, by id."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()

    def begin(self, request_id: str) -> Record:
        """A request begins."""
        record = self._records[request_id] = Record(request_id, time.time())
        self._records.move_to_end(request_id)
        if len(self._records) > KEPT:
            self._records.popitem(last=False)
        return record

    def find(self, request_id: str) -> Record | None:
        """The record of that id, if it is still kept."""
        return self._records.get(request_id)

    def newest(self, limit: int, strategy: str = "", status: str = "") -> list[Record]:
        """At most `limit`, newest first, that have this strategy and status (empty: any; "failed": all others)."""
        found: list[Record] = []
        for record in reversed(self._records.values()):
            bad = record.status not in ("done", "running")
            if (not strategy or record.strategy == strategy) and (
                not status or record.status == status or (status == "failed" and bad)
            ):
                found.append(record)
                if len(found) == limit:
                    break
        return found
