"""Draws one trace as a waterfall: a tree of spans, each with its bar on the common time line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from kvmesh.local.spans import REQUEST_ID, Span

EIGHTHS = " ▏▎▍▌▋▊▉█"
COLOURS = ("cyan", "green", "magenta", "blue", "yellow")
# Columns of a number, between columns, and what must be left for bar and details to share a line.
NUMBER, GAP, BESIDE = 9, 2, 70
# Told elsewhere, or of no use to a reader.
HIDDEN = {REQUEST_ID, "kvmesh.trace_id", "error.type", "rpc.system", "gen_ai.operation.name", "kvmesh.strategy"}


class Waterfall:
    """A rich renderable of the spans of one trace. Details end a line, or stand below it on a narrow terminal."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = list(spans)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.spans:
            return
        rows = list(tree(self.spans))
        begin, end = min(s.start for s in self.spans), max(s.end for s in self.spans)
        instances = list(dict.fromkeys(s.instance for _, s in rows))
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(instances)}
        labels = ["  " * depth + span.name for depth, span in rows]
        label_width = min(max(map(len, [*labels, "span"])), max(16, options.max_width // 3))
        instance_width = min(max(map(len, [*instances, "where"])), 16)
        rest = options.max_width - label_width - instance_width - 2 * NUMBER - 3 * GAP
        wide = rest >= BESIDE
        bar = max(8, min(rest // 2, 40) if wide else min(rest, 60))
        yield _line(("span", label_width, "bold"), ("where", instance_width, "bold"), "at ms", "took ms")
        for label, (_, span) in zip(labels, rows, strict=True):
            line = _line(
                (label, label_width, "red" if span.error else ""),
                (span.instance, instance_width, colours[span.instance]),
                f"{span.start - begin:.1f}",
                f"{span.end - span.start:.1f}",
            )
            drawn = _bar(span.start - begin, span.end - begin, end - begin, bar)
            line.append(drawn.ljust(bar) if wide else drawn, style="red" if span.error else colours[span.instance])
            indent = len(line) + GAP if wide else len(label) - len(label.lstrip()) + 2
            details = _wrapped(_details(span, begin), console, options.max_width - indent)
            if wide and details:
                line.append(" " * GAP).append(details.pop(0))
            yield line
            for part in details:
                yield Text(" " * indent, no_wrap=True).append(part)


def _wrapped(text: Text, console: Console, width: int) -> list[Text]:
    """`text` in lines of `width`; none for no text."""
    lines = list(text.wrap(console, max(20, width))) if text else []
    for line in lines:
        line.rstrip()
    return lines


def _line(label: tuple[str, int, str], instance: tuple[str, int, str], at: str, took: str) -> Text:
    line = Text(no_wrap=True)
    for text, width, style in (label, instance):
        cell = Text(text, style=style)
        cell.truncate(width, overflow="ellipsis", pad=True)
        line.append(cell).append(" " * GAP)
    return line.append(at.rjust(NUMBER)).append(took.rjust(NUMBER)).append(" " * GAP)


def tree(spans: Iterable[Span]) -> Iterable[tuple[int, Span]]:
    """(depth, span) in reading order: children after their parent, by start; a span of unknown parent at depth 0."""
    ordered = sorted(spans, key=lambda s: (s.start, -s.end))
    known = {s.span_id for s in ordered}
    children: dict[str, list[Span]] = {}
    for span in ordered:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else ""
        children.setdefault(parent, []).append(span)
    stack = [(0, s) for s in reversed(children.get("", []))]
    while stack:
        depth, span = stack.pop()
        yield depth, span
        stack.extend((depth + 1, s) for s in reversed(children.get(span.span_id, [])))


def _bar(start: float, end: float, total: float, width: int) -> str:
    """A bar from `start` to `end` on a line of `width` cells that stands for `total`, an eighth of a cell exact."""
    scale = width * 8 / total if total > 0 else 0
    first, last = round(start * scale), round(end * scale)
    if last - first < 1:
        return " " * min(first // 8, width - 1) + "▏"
    cells, lead = [], first // 8
    for cell in range(lead, (last + 7) // 8):
        covered = min(last, cell * 8 + 8) - max(first, cell * 8)
        # A cell can be filled from its left only: one that begins late is drawn whole once it is half covered.
        cells.append(EIGHTHS[covered] if first <= cell * 8 else ("█" if covered >= 4 else "▕"))
    return (" " * lead + "".join(cells))[:width]


def _details(span: Span, begin: float) -> Text:
    if span.error:
        kind = span.attributes.get("error.type")
        return Text(f"{kind}: {span.error}" if kind else span.error, style="red")
    parts = [_detail(k, v) for k, v in span.attributes.items() if k not in HIDDEN and v not in ("", None)]
    for at, name, attributes in span.events:
        reason = " ".join(_detail(k, v) for k, v in attributes.items())
        parts.append(f"{name}@{at - begin:.1f}ms" + (f" ({reason})" if reason else ""))
    return Text("  ".join(parts), style="dim")


def _detail(key: str, value: Any) -> str:
    name = key.removeprefix("kvmesh.").removeprefix("gen_ai.")
    if isinstance(value, int) and not isinstance(value, bool) and key.endswith("bytes"):
        return f"{name}={human_bytes(value)}"
    if isinstance(value, float) and key.endswith("_s"):
        return f"{name.removesuffix('_s')}={value * 1000:.1f}ms"
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def human_bytes(count: int) -> str:
    """A size for people: 512 B, 3.1 MiB."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
