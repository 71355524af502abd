"""How fast an engine is, and how large: a small TOML file, shipped, fitted by `kvmesh profile`, or written by hand."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvmesh.config import read_toml
from kvmesh.dataplane.layout import ITEM_BYTES, Layout
from kvmesh.errors import InvalidArgument

SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class ModelShape:
    """The model. KV sizes are of one rank, as in KvLayout."""

    name: str
    vocab_size: int
    context_length: int
    layers: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    ranks: int = 1
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prefill:
    """Seconds of a pass over tokens [p:q):

    base + per_token (q - p) + per_token_squared (q² - p²) + per_end_squared q². The last is of back ends that compute
    the attention of the tokens before the pass again: SGLang's torch_native, which serves on processors.
    """

    base: float
    per_token: float
    per_token_squared: float = 0.0
    per_end_squared: float = 0.0


@dataclass(frozen=True)
class Decode:
    """Seconds for a step: base + per_request x requests + per_kv_token x tokens of all their contexts."""

    base: float
    per_request: float = 0.0
    per_kv_token: float = 0.0


@dataclass(frozen=True)
class Batching:
    """The scheduler.

    `mixed`: prefill chunks and decodes share a step, which costs both less `overlap` (0 to 1) of the smaller; else
    prefills go first. `reserve`: the share of its longest answer that must have room before a request begins.
    """

    kv_tokens: int
    chunk_tokens: int
    max_running: int = 256
    mixed: bool = False
    overlap: float = 0.0
    reserve: float = 0.5


@dataclass(frozen=True)
class Transfer:
    """The engine's link to others, each way: bytes a second over all ranks, and seconds that each send takes besides.

    They come with its last chunk: no computing hides them.
    """

    bytes_per_second: float
    latency: float = 0.0


@dataclass(frozen=True)
class Profile:
    """All of it. `jitter`: relative standard deviation of a step's time.

    `contention`: the share by which each other engine of a simulation that computes makes a step longer, when the step
    begins: engines on one machine's processors.
    """

    name: str
    device: str
    model: ModelShape
    prefill: Prefill
    decode: Decode
    batching: Batching
    transfer: Transfer
    note: str = ""
    jitter: float = 0.0
    contention: float = 0.0
    fitted: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def layout(self) -> Layout:
        """Of the KV that its engines say they have. Its digest is no real model's: real engines refuse it."""
        m = self.model
        digest = blake2b(f"simulated {m}".encode(), digest_size=16).hexdigest()
        return Layout(digest, m.dtype, m.layers, m.heads, m.head_dim, m.head_dim, 1, m.ranks)

    @property
    def bytes_per_token(self) -> int:
        """KV over all ranks."""
        return self.layout.bytes_per_token * self.model.ranks

    def prefill_seconds(self, chunks: list[tuple[int, int]]) -> float:
        """One pass over these [begin, end)."""
        p = self.prefill
        return p.base + sum(
            (e - b) * p.per_token + (e * e - b * b) * p.per_token_squared + e * e * p.per_end_squared for b, e in chunks
        )

    def decode_seconds(self, requests: int, kv_tokens: int) -> float:
        """One step of so many requests, whose contexts have `kv_tokens` in sum."""
        d = self.decode
        return d.base + d.per_request * requests + d.per_kv_token * kv_tokens

    def mixed_seconds(self, prefill: float, decode: float) -> float:
        """One step of both."""
        return prefill + decode - self.batching.overlap * min(prefill, decode)

    def replace(self, **batching: Any) -> Profile:
        """With other values of `batching`."""
        return dataclasses.replace(self, batching=dataclasses.replace(self.batching, **batching))

    def dump(self) -> str:
        """As TOML."""
        plain = dataclasses.asdict(self)
        tables = {k: v for k, v in plain.items() if isinstance(v, dict)}
        lines = [f"{k} = {_toml(v)}" for k, v in plain.items() if k not in tables]
        for name, table in tables.items():
            if table:
                lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


def _check(p: Profile) -> None:
    counts = {
        "model.vocab_size": p.model.vocab_size,
        "model.context_length": p.model.context_length,
        "model.layers": p.model.layers,
        "model.heads": p.model.heads,
        "model.head_dim": p.model.head_dim,
        "model.ranks": p.model.ranks,
        "batching.kv_tokens": p.batching.kv_tokens,
        "batching.chunk_tokens": p.batching.chunk_tokens,
        "batching.max_running": p.batching.max_running,
    }
    for name, count in counts.items():
        if count < 1:
            raise InvalidArgument(f"profile {p.name}: {name} = {count} is not 1 or more")
    times = {"jitter": p.jitter, "contention": p.contention, "transfer.latency": p.transfer.latency}
    for part in ("prefill", "decode"):
        times |= {f"{part}.{k}": v for k, v in dataclasses.asdict(getattr(p, part)).items()}
    for name, value in times.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"profile {p.name}: {name} = {value} is not a finite number of 0 or more")
    if p.prefill.base + p.prefill.per_token <= 0 or p.decode.base + p.decode.per_request <= 0:
        raise InvalidArgument(f"profile {p.name}: prefill and decode must take time")
    if not p.transfer.bytes_per_second > 0:
        raise InvalidArgument(
            f"profile {p.name}: transfer.bytes_per_second = {p.transfer.bytes_per_second} is not above 0"
        )
    if p.model.dtype not in ITEM_BYTES:
        raise InvalidArgument(
            f"profile {p.name}: model.dtype = {p.model.dtype!r} is not one of {', '.join(ITEM_BYTES)}"
        )
    for name in ("overlap", "reserve"):
        if not 0 <= getattr(p.batching, name) <= 1:
            raise InvalidArgument(
                f"profile {p.name}: batching.{name} = {getattr(p.batching, name)} is not between 0 and 1"
            )


def shipped() -> list[str]:
    """Names of the profiles that come with kvmesh."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """The shipped profile of that name, or the one in that file. Raises InvalidArgument."""
    path = SHIPPED / f"{name}.toml" if name in shipped() else Path(name).expanduser()
    if not path.is_file():
        raise InvalidArgument(f"profile {name!r} is no file, and not one of {', '.join(shipped())}")
    content = read_toml(path)
    content.setdefault("name", path.stem)
    return _build(Profile, content, f"profile {path.stem}")


T = typing.TypeVar("T")


def _build(kind: type[T], content: dict[str, Any], where: str) -> T:
    """An instance of a dataclass, checked entry by entry."""
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        hint = hints.get(key)
        if hint is None:
            raise InvalidArgument(f"{where}: there is no entry {key!r}; there is: {', '.join(hints)}")
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            values[key] = _build(typing.cast("type[Any]", hint), value, f"{where}: {key}")
        elif hint is float and type(value) in (int, float):
            values[key] = float(value)
        elif hint in (int, str, bool) and type(value) is hint:
            values[key] = value
        elif hint == tuple[int, ...] and isinstance(value, list) and all(type(v) is int for v in value):
            values[key] = tuple(value)
        elif hint == dict[str, float] and isinstance(value, dict):
            values[key] = {str(k): float(v) for k, v in value.items()}
        else:
            raise InvalidArgument(f"{where}: {key} = {value!r} is not of type {getattr(hint, '__name__', hint)}")
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and _required(f)]  # type: ignore[arg-type]
        raise InvalidArgument(f"{where}: missing: {', '.join(missing)}") from None


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
