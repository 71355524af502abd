"""How the KV of one model lies in a pool."""

from __future__ import annotations

import dataclasses
import json
from hashlib import blake2b

from kvmesh.errors import InvalidArgument
from kvmesh.v1.common_pb2 import KvLayout

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Each layer's keys, and its values, begin on a page of memory.
ALIGN = 4096


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two pools can exchange KV if their layouts are equal. `heads` are of one rank; see KvLayout for the rest."""

    model_digest: str
    dtype: str
    layers: int
    heads: int
    k_dim: int
    v_dim: int
    page_size: int
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise InvalidArgument(f"KV of dtype {self.dtype!r} cannot be moved: it is not {', '.join(ITEM_BYTES)}")

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over everything."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return blake2b(fields.encode(), digest_size=16).hexdigest()

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token over all layers, in one rank's pool."""
        return self.layers * self.heads * (self.k_dim + self.v_dim) * ITEM_BYTES[self.dtype]

    def part_bytes(self, rows: int) -> list[int]:
        """Sizes of the parts of a pool of `rows` rows, in order: K and V of each layer, rounded up to ALIGN."""
        sizes = [rows * self.heads * dim * ITEM_BYTES[self.dtype] for dim in (self.k_dim, self.v_dim)]
        return [-(-size // ALIGN) * ALIGN for size in sizes] * self.layers

    def message(self) -> KvLayout:
        """As it travels."""
        fields = dataclasses.asdict(self)
        return KvLayout(fingerprint=self.fingerprint, bytes_per_token=self.bytes_per_token, **fields)

    @staticmethod
    def of(message: KvLayout) -> Layout:
        """What `message` says; its fingerprint is not taken on trust."""
        return Layout(**{f.name: getattr(message, f.name) for f in dataclasses.fields(Layout)})


def difference(ours: KvLayout, theirs: KvLayout) -> str:
    """What differs between two layouts of unequal fingerprints, in words; one of them may be incomplete."""
    names = [field.name for field in dataclasses.fields(Layout)]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    unequal = [f"{name} is {there} there and {here} here" for name, there, here in pairs if there != here]
    return ", ".join(unequal) or f"the fingerprint is {theirs.fingerprint} there and {ours.fingerprint} here"


def refusal(ours: Layout, theirs: Layout) -> str:
    """Names what differs, in words; empty when KV can be exchanged."""
    a, b = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    return ", ".join(f"{name} is {b[name]} there and {a[name]} here" for name in a if a[name] != b[name])
