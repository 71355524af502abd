"""Brings the tables in docs/ up to date: settings from the dataclasses, calls and statuses from the protos.

A table stands between `<!-- table: KIND NAME -->` and `<!-- end -->`. `make docs` runs this; a test checks its result.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RPC = re.compile(r"((?:  //[^\n]*\n)+)  rpc (\w+)\((stream )?\w+\) returns \((stream )?")
STATUS = re.compile(r"  //   ([A-Z_]+) +(.+)")


def main() -> int:
    """Rewrites the tables; prints the files that changed."""
    for path in sorted((REPO / "docs").glob("*.md")):
        old = path.read_text()
        new = filled(old)
        if new != old:
            path.write_text(new)
            print(f"brought {path.relative_to(REPO)} up to date")
    return 0


def filled(text: str) -> str:
    """`text` with all its tables anew."""
    tables = {"settings": settings, "calls": calls}
    return PLACE.sub(lambda m: m[1] + tables[m[2]](m[3]) + m[4], text)


def settings(service: str) -> str:
    """Flags, defaults and meanings of one service; those that all services share are left to `common`."""
    from kvmesh.config import ServiceConfig
    from kvmesh.local.options import MeshOptions
    from services.engine.cli import EngineConfig
    from services.registry.cli import RegistryConfig
    from services.router.cli import RouterConfig

    kinds = {"engine": EngineConfig, "router": RouterConfig, "registry": RegistryConfig, "up": MeshOptions}
    shared = {f.name: (f.default, f.metadata) for f in dataclasses.fields(ServiceConfig)}
    kind = kinds.get(service, ServiceConfig)
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if kind is not ServiceConfig and shared.get(field.name) == (field.default, field.metadata):
            continue
        text, default = field.metadata["help"], f"`{field.default}`"
        if found := re.search(r" \[default: (.*)\]$", text):
            text, default = text[: found.start()], found[1]
        elif field.default in ("", ()):
            default = "none"
        elif isinstance(field.default, bool):
            default = "yes" if field.default else "no"
        rows.append(f"| `--{field.name.replace('_', '-')}` | {default} | {text} |")
    return "\n".join(rows) + "\n"


def calls(service: str) -> str:
    """The calls of one gRPC service with the statuses that each may end with."""
    texts = [p.read_text() for p in sorted((REPO / "protos").rglob("*.proto"))]
    (body,) = [
        found[1] for text in texts if (found := re.search(rf"\nservice {service} {{\n(.*?)\n}}", text, re.DOTALL))
    ]
    rows = ["| call | what it does, and with which status it refuses |", "|---|---|"]
    for comment, name, asking, answering in RPC.findall(body):
        what: list[str] = []
        refused: list[str] = []
        for line in comment.splitlines():
            if status := STATUS.fullmatch(line):
                refused.append(f"`{status[1]}`: {status[2]}")
            elif refused:
                refused[-1] += f" {line.removeprefix('  //').strip()}"
            else:
                what.append(line.removeprefix("  //").strip())
        streams = " (stream)" if asking or answering else ""
        rows.append(f"| `{name}`{streams} | {'<br>'.join([' '.join(what), *refused])} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
