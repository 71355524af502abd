"""The dashboard at `/`, and the JSON that it is made of."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response
from google.protobuf.json_format import MessageToDict

from kvmesh.errors import NotFound, ResourceExhausted
from kvmesh.local.spans import Span, settled_trace
from services.router.recent import Recent
from services.router.service import RouterService

MOST = 2000
# How long a trace is waited for: processes write their spans a little later.
SETTLE_S = 1.5
# At once: each takes a thread, and reads files.
MOST_READING = 4


class Dashboard:
    """The routes. `traces` are the folders where this machine's span files are."""

    def __init__(self, service: RouterService, recent: Recent, traces: list[Path]) -> None:
        self._service = service
        self._recent = recent
        self._traces = traces
        self._reading = 0
        self.router = APIRouter(tags=["dashboard"])
        self.router.get("/", include_in_schema=False)(self.page)
        self.router.get("/dashboard.js", include_in_schema=False)(self.script)
        self.router.get("/dashboard.css", include_in_schema=False)(self.style)
        self.router.get("/api/mesh")(self.mesh)
        self.router.get("/api/requests")(self.requests)
        self.router.get("/api/requests/{request_id}/trace")(self.trace)
        self.router.get("/api/requests/{request_id}/perfetto")(self.perfetto)

    async def page(self) -> Response:
        """The page itself."""
        return HTMLResponse(_asset("index.html"))

    async def script(self) -> Response:
        """Its script."""
        return Response(_asset("dashboard.js"), media_type="text/javascript")

    async def style(self) -> Response:
        """Its style."""
        return Response(_asset("dashboard.css"), media_type="text/css")

    async def mesh(self) -> Response:
        """The mesh as this router sees it: GetMeshResponse in protobuf's JSON form."""
        mesh = self._service.mesh()
        return JSONResponse(
            MessageToDict(mesh, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        )

    async def requests(
        self, limit: int = Query(200, ge=1, le=MOST), strategy: str = "", status: str = ""
    ) -> dict[str, Any]:
        """The newest requests of this router; `status`: running, done, failed, or a gRPC status."""
        return {"requests": [record.fields() for record in self._recent.newest(limit, strategy, status)]}

    async def trace(self, request_id: str) -> dict[str, Any]:
        """All spans of a request; times in milliseconds since the epoch."""
        return {"request_id": request_id, "spans": [_span(span) for span in await self._spans(request_id)]}

    async def perfetto(self, request_id: str) -> Response:
        """The same in the form that https://ui.perfetto.dev opens: one track an instance and depth."""
        body = {"traceEvents": _trace_events(await self._spans(request_id)), "displayTimeUnit": "ms"}
        name = "".join(c if c.isalnum() else "_" for c in request_id)
        return JSONResponse(body, headers={"content-disposition": f'attachment; filename="trace-{name}.json"'})

    async def _spans(self, request_id: str) -> list[Span]:
        if self._reading >= MOST_READING:
            raise ResourceExhausted(f"{self._reading} traces are being read; try again in a moment")
        # Only what ran here lately can still be on its way to the files.
        patience = SETTLE_S if self._recent.find(request_id) is not None else 0.0
        self._reading += 1
        try:
            spans = await asyncio.to_thread(settled_trace, request_id, self._traces, patience, 0.4)
        finally:
            self._reading -= 1
        if not spans:
            raise NotFound(f"no trace of request {request_id!r}: not sampled, too old, or written on other machines")
        return spans


def _asset(name: str) -> str:
    return (files("services.router.http") / "static" / name).read_text()


def _span(span: Span) -> dict[str, Any]:
    return {
        "id": span.span_id,
        "parent": span.parent_id,
        "name": span.name,
        "instance": span.instance,
        "start": span.start,
        "end": span.end,
        "error": span.error,
        "attributes": {k: v for k, v in span.attributes.items() if v not in ("", None)},
    }


def _trace_events(spans: list[Span]) -> list[dict[str, Any]]:
    """Complete events ("X") of Chrome's trace format; one process an instance."""
    pids = {name: i + 1 for i, name in enumerate(dict.fromkeys(s.instance for s in spans))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}} for name, pid in pids.items()
    ]
    # Spans that overlap without one holding the other need lanes of their own.
    lanes: dict[tuple[int, int], list[float]] = {}
    for span in spans:
        pid, lane = pids[span.instance], 0
        while True:
            ends = lanes.setdefault((pid, lane), [])
            while ends and ends[-1] <= span.start:
                ends.pop()
            if not ends or span.end <= ends[-1]:
                ends.append(span.end)
                break
            lane += 1
        arguments = {**span.attributes, **({"error": span.error} if span.error else {})}
        begin, length = round(span.start * 1000), max(1, round((span.end - span.start) * 1000))
        events.append(
            {"ph": "X", "name": span.name, "pid": pid, "tid": lane, "ts": begin, "dur": length, "args": arguments}
        )
    return events
