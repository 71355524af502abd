"""Texts and tables of the commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from google.protobuf.message import Message
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvmesh.client import Result
from kvmesh.local.show_stores import stores_part
from kvmesh.local.waterfall import human_bytes
from kvmesh.v1 import router_pb2 as pb

# A model's output must not drive the terminal: control characters but newline and tab become their pictures.
_LOW = {c: 0x2400 + c for c in range(32) if c not in (9, 10)}
_VISIBLE = {**_LOW, 127: 0x2421, **dict.fromkeys(range(128, 160), 0xFFFD)}


class Screen:
    """Streamed text on standard output, ended by a newline."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._table = _VISIBLE if out.isatty() else {}
        self._last = "\n"

    def write(self, text: str) -> None:
        """Shows `text` at once."""
        if text:
            self._last = text[-1]
            self._out.write(text.translate(self._table))
            self._out.flush()

    def end(self) -> None:
        """Ends the line that was begun."""
        if self._last != "\n":
            self.write("\n")


def choice_line(choice: pb.StrategyChoice) -> str:
    """One line: name, parameters, revision; of a trial or a guarded change also its share and bounds."""
    more = [f"revision {choice.revision}"]
    if choice.share_percent:
        more.append(f"on trial for {choice.share_percent:g} % of the sessions")
    if choice.guard.max_error_rate:
        more.append(f"until over {choice.guard.max_error_rate:.1%} fail")
    if choice.guard.max_ttft_seconds:
        more.append(f"until the mean TTFT is over {choice.guard.max_ttft_seconds:g} s")
    if choice.ended:
        more.append(choice.ended)
    return f"{choice.name}{_params(choice.params)} ({', '.join(more)})"


def in_force_lines(reply: pb.GetStrategyResponse) -> list[str]:
    """The strategy in force; then, if there are any, the one on trial and those before."""
    lines = [choice_line(reply.strategy)]
    if reply.HasField("trial"):
        lines.append(choice_line(reply.trial))
    return [*lines, *(f"before: {choice_line(past)}" for past in reply.history)]


def _params(params: Mapping[str, str]) -> str:
    return "".join(f" {k}={v}" for k, v in sorted(params.items()))


def mesh_page(mesh: pb.GetMeshResponse, address: str, ended: Sequence[str]) -> Group:
    """What `kvmesh status` shows; `ended` are local processes that are gone."""
    registry = Text("connected") if mesh.registry_connected else Text("not reached: this is what was last known", "red")
    lines = [
        Text(f"router    {mesh.router.name or '?'} at {address}, {mesh.running_requests} requests running"),
        Text("registry  ").append(registry),
        Text(f"strategy  {choice_line(mesh.strategy)}"),
        *([Text(f"trial     {choice_line(mesh.trial)}", style="yellow")] if mesh.HasField("trial") else []),
        *(Text(f"model     {line}") for line in _models(mesh)),
        *(Text(f"ended     {line}", style="red") for line in ended),
        Text(""),
    ]
    if not mesh.engines:
        return Group(*lines, Text("no engines", style="red"))
    labelled = any(engine.member.labels for engine in mesh.engines)
    table = _table("engine", "address", "state")
    for column in ("run", "wait", "free", "cached", "in use", "held", "total"):
        table.add_column(column, justify="right")
    if labelled:
        table.add_column("labels", overflow="fold")
    for engine in mesh.engines:
        labels = " ".join(f"{k}={v}" for k, v in sorted(engine.member.labels.items()))
        table.add_row(*_engine_row(engine), *([labels] if labelled else []))
    legend = "KV slots, free to total, are in tokens; held: reserved for transfers"
    return Group(*lines, table, Text(legend, style="dim"), *stores_part(mesh.stores))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _models(mesh: pb.GetMeshResponse) -> list[str]:
    """What the engines serve, and on what; who does where they differ."""
    served: dict[str, list[str]] = {}
    for engine in mesh.engines:
        info = engine.info
        if info.model.name:
            ways = f", KV by {' or '.join(info.transports)}" if info.transports else ""
            line = f"{info.model.name} in {info.layout.dtype} on {info.device}, {info.runtime}{ways}"
            served.setdefault(line, []).append(engine.member.endpoint.name)
    if len(served) == 1:
        return [*served]
    return [f"{line}: {', '.join(names)}" for line, names in served.items()]


def _engine_row(engine: pb.MeshEngine) -> list[str | Text]:
    load = engine.load
    numbers = [
        load.running_requests,
        load.waiting_requests,
        load.free_slots,
        load.cached_slots,
        load.running_slots,
        load.reserved_slots + load.quarantined_slots,
        engine.info.total_slots,
    ]
    state = Text("up", "green") if engine.connected else Text("lost", "red")
    if engine.connected and engine.suspended:
        state = Text("up, failing", "yellow")
    return [engine.member.endpoint.name, engine.member.endpoint.address, state, *map(str, numbers)]


def strategies_page(strategies: Iterable[pb.StrategyInfo], in_force: str) -> Table:
    """All strategies with their parameters; the one in force is marked."""
    table = _table("strategy", "what it does", "parameters")
    for info in strategies:
        params = [
            f"{p.name}={p.default_value} ({p.type}{', ' + p.constraint if p.constraint else ''})" for p in info.params
        ]
        mark = " (in force)" if info.name == in_force else ""
        what = Text(info.summary)
        if info.error:
            what.append(("\n" if info.summary else "") + (f"{info.file}: " if info.file else "") + info.error, "red")
        table.add_row(Text(info.name + mark, "bold" if mark else ""), what, Text("\n".join(params)))
    return table


def result_page(result: Result) -> str:
    """The summary under a streamed answer."""
    usage = result.usage
    why = result.reason.replace("_", " ") + (f" {result.matched!r}" if result.matched is not None else "")
    lines = [
        f"{result.strategy}: {usage.prompt_tokens} prompt tokens, {len(result.token_ids)} new, ended by {why}",
        f"ttft {result.ttft_seconds * 1000:.1f} ms, tpot {result.tpot_seconds * 1000:.1f} ms, "
        f"jct {result.jct_seconds * 1000:.1f} ms" + (f", {result.attempts} attempts" if result.attempts > 1 else ""),
        *(f"  {share.engine}: {share_text(share)}" for share in result.shares),
        f"kvmesh trace {result.request_id}" if result.trace_id else f"request {result.request_id} (not traced)",
    ]
    return "\n".join(lines)


def share_text(share: pb.EngineShare) -> str:
    """What one engine did, in words."""
    parts = [
        f"{share.cached_tokens} tokens cached" if share.cached_tokens else "",
        f"{share.received_tokens} received" if share.received_tokens else "",
        f"{share.prefilled_tokens} prefilled" if share.prefilled_tokens else "",
        f"sent {human_bytes(share.sent_bytes)} over {share.transport}" if share.sent_bytes else "",
        f"{share.decoded_tokens} decoded" if share.decoded_tokens else "",
    ]
    return ", ".join(p for p in parts if p) or "nothing"


def result_json(result: Result) -> str:
    """The whole result as one JSON object."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    fields["usage"] = _flat(result.usage)
    fields["shares"] = [_flat(share) for share in result.shares]
    return json.dumps(fields, ensure_ascii=False)


def _flat(message: Message) -> dict[str, Any]:
    """A message of scalars; protobuf's own JSON would make strings of its large integers."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
