"""Random and mutated protobuf messages, by their descriptors alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

INTEGERS = {
    Field.TYPE_INT32: (31, True),
    Field.TYPE_SINT32: (31, True),
    Field.TYPE_UINT32: (32, False),
    Field.TYPE_INT64: (63, True),
    Field.TYPE_SINT64: (63, True),
    Field.TYPE_UINT64: (64, False),
    Field.TYPE_FIXED64: (64, False),
    Field.TYPE_FIXED32: (32, False),
}
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "x" * 300,
    "é☃𝄞",
    "../../etc/passwd",
    "'; DROP TABLE",
    "%s%n",
    "{}",
    "a b",
    "-1",
    "1e309",
    "nan",
)


class Maker:
    """Makes messages; `known` gives a fitting value for a field's name now and then, None for none."""

    def __init__(self, rng: random.Random, known: Callable[[Any], Any]) -> None:
        self.rng = rng
        self._known = known

    def message(self, kind: Any, depth: int = 0) -> Message:
        """A message of that descriptor."""
        made = message_factory.GetMessageClass(kind)()
        self.fill(made, depth)
        return made

    def fill(self, made: Message, depth: int = 0) -> None:
        """Sets some of the fields."""
        for field in made.DESCRIPTOR.fields:
            if self.rng.random() < (0.25 if depth < 3 else 0.8):
                continue
            self.set(made, field, depth)

    def mutate(self, made: Message) -> None:
        """Changes a few fields, anywhere in it."""
        for _ in range(self.rng.randint(1, 3)):
            target = made
            while True:
                field = self.rng.choice(target.DESCRIPTOR.fields) if target.DESCRIPTOR.fields else None
                if field is None:
                    break
                nested = field.message_type is not None and not field.is_repeated and target.HasField(field.name)
                if nested and self.rng.random() < 0.7:
                    target = getattr(target, field.name)
                    continue
                if self.rng.random() < 0.2:
                    target.ClearField(field.name)
                else:
                    self.set(target, field, 1)
                break

    def set(self, made: Message, field: Any, depth: int) -> None:
        """Gives one field a value."""
        known = self._known(field) if self.rng.random() < 0.6 else None
        if field.is_repeated:
            made.ClearField(field.name)
            self._fill_list(getattr(made, field.name), field, known, depth)
        elif field.message_type is not None:
            target = getattr(made, field.name)
            target.SetInParent()
            if known is not None:
                target.CopyFrom(known)
            elif depth < 5:
                self.fill(target, depth + 1)
        else:
            try:
                setattr(made, field.name, self.scalar(field) if known is None else known)
            except (TypeError, ValueError):
                # What fits a field of that name elsewhere.
                setattr(made, field.name, self.scalar(field))

    def _fill_list(self, target: Any, field: Any, known: Any, depth: int) -> None:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            value = entry.fields_by_name["value"]
            for _ in range(self.rng.choice((0, 1, 3))):
                if value.message_type is None:
                    target[self.rng.choice(TEXTS)] = self.scalar(value)
        elif known is not None:
            target.extend(known)
        elif entry is not None:
            for _ in range(self.rng.choice((0, 1, 3))):
                self.fill(target.add(), depth + 2)
        else:
            target.extend(self.scalar(field) for _ in range(self.rng.choice((0, 1, 2, 17, 300))))

    def scalar(self, field: Any) -> Any:
        """A value that the field's type can hold."""
        rng = self.rng
        if field.type in INTEGERS:
            bits, signed = INTEGERS[field.type]
            most = 2**bits - 1
            value = rng.choice((0, 1, 2, 7, 64, 100, 383, 384, 1000, 65536, most, most - 1, rng.randint(0, most)))
            return -value if signed and rng.random() < 0.3 else value
        if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
            return rng.choice(FLOATS)
        if field.type == Field.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == Field.TYPE_ENUM:
            return rng.choice((*[v.number for v in field.enum_type.values], 99, -1))
        if field.type == Field.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 16, 300)))
        return rng.choice(TEXTS) if rng.random() < 0.8 else "".join(chr(rng.randint(1, 0xD7FF)) for _ in range(20))

    def garbage(self, content: bytes) -> bytes:
        """Bytes that may be no message: cut off, flipped, or random."""
        rng = self.rng
        kind = rng.randrange(3)
        if kind == 0:
            return content[: rng.randint(0, len(content))]
        if kind == 1 and content:
            flipped = bytearray(content)
            for _ in range(rng.randint(1, 8)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        return rng.randbytes(rng.randint(1, 200))
