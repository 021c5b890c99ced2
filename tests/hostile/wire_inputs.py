"""Random requests made from the descriptors alone: a new call, message or field is covered without a change here.

Values are drawn by type, and by the field's name from what the daemon itself said and accepted before (:class:`Heard`):
without the right job, version, segment or lease nothing but the first check of each call would ever be reached.
"""

from __future__ import annotations

import math
import random
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cairn_api.v1 import admin_pb2, restore_pb2, save_pb2

METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for file in (save_pb2, restore_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)

HOSTILE_TEXTS = (
    "", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "a/", ".cairn",
    ".cairn/manifest.json", "a/.cairn/b", "by-rank/0/x", "a\0b", "a\nb", "\n", " ", "%s%n{0}", "ünïcödé", "\U0001f600",
    "\u202e", "x" * 128, "x" * 129, "x" * 5000, "/".join(["a"] * 400), "-x", "~root", "$(x)", "e00001-s000001-t",
    "e99999999999-s1-t", "e00000-s000000-t", "file:///etc", "file://../x", "s3://nowhere/x", "http://127.0.0.1:1/", "://",
    "NaN", "true", "0" * 32, "[bold]x[/]", "\x1b[31m",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 7, 255, 4096, 65536, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 0.01, 1e-300, 1e308, math.inf, -math.inf, math.nan)
_TEXT_BYTES = (0, 1, 20, 300, 20_000)
_LARGE_BYTES = 1_000_000
_COLUMN = struct.Struct("<Q")

_INTEGERS: Mapping[int, tuple[int, int]] = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
}


class Heard:
    """Values that were seen in requests that the daemon accepted, and in its replies, by the name of their field.

    Whole messages are remembered by their type. Bounded: the oldest give way.
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, deque[Any]] = defaultdict(lambda: deque(maxlen=30))
        self._requests: defaultdict[str, deque[bytes]] = defaultdict(lambda: deque(maxlen=20))

    def value(self, name: str, value: Any) -> None:
        """Remember one value."""
        if value not in ("", b"") and len(str(value)) < 2000:
            self._values[name].append(value)

    def accepted(self, request: Message) -> None:
        """Remember a request whose call succeeded: it is sent again, changed."""
        packed = request.SerializeToString()
        if len(packed) < 10_000:
            self._requests[request.DESCRIPTOR.full_name].append(packed)
        self.message(request)

    def message(self, message: Message) -> None:
        """Remember what is in a message."""
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                if _is_map(field):
                    continue
                for item in list(value)[:5] if field.is_repeated else [value]:
                    self._requests[item.DESCRIPTOR.full_name].append(item.SerializeToString())
                    self.message(item)
            else:
                for item in list(value)[:5] if field.is_repeated else [value]:
                    self.value(field.name, item)

    def like(self, name: str, chance: random.Random) -> Any:
        """A value heard under *name*, or under a name that it is part of (``segment`` and ``free_segments``)."""
        near = [known for known in self._values if name in known or known in name]
        values = self._values[chance.choice(near)] if near else ()
        return chance.choice(values) if values else None

    def request(self, kind: Any, chance: random.Random) -> bytes | None:
        """A message of *kind* that was accepted before, packed."""
        known = self._requests.get(kind.full_name)
        return chance.choice(known) if known else None


class Requests:
    """Makes requests. ``fields`` counts how often each field was set, by its full name."""

    def __init__(self, chance: random.Random, heard: Heard, *, large: float = 0.001) -> None:
        """*large*: how likely a text, bytes or list is a large one."""
        self._chance = chance
        self._heard = heard
        self._large = large
        self.fields: Counter[str] = Counter()

    def request(self, kind: Any) -> Message:
        """A request of that kind: one that was accepted before with some fields changed, or an all new one."""
        message: Message = GetMessageClass(kind)()
        before = self._heard.request(kind, self._chance)
        if before is None or self._chance.random() < 0.35:
            self._fill(message, depth=0)
            return message
        message.MergeFromString(before)
        for _ in range(self._chance.choice((0, 1, 1, 1, 2, 3))):
            self._change(message)
        return message

    def packed(self, kind: Any) -> tuple[bytes, Message | None]:
        """A request as bytes, and as a message unless the bytes were damaged afterwards."""
        message = self.request(kind)
        data = message.SerializeToString()
        if self._chance.random() < 0.85:
            return data, message
        return self.damaged(data), None

    def damaged(self, data: bytes) -> bytes:
        """*data* cut, lengthened, with flipped bits, or all random."""
        chance = self._chance
        match chance.randrange(5):
            case 0:
                return data[: chance.randrange(len(data) + 1)]
            case 1:
                return data + chance.randbytes(chance.randrange(1, 50))
            case 2:
                return chance.randbytes(chance.choice((1, 2, 10, 100, 5000)))
            case 3:  # a length that promises more than there is
                return data + b"\x0a\xff\xff\xff\xff\x07"
            case _:
                flipped = bytearray(data or b"\0")
                for _ in range(chance.randrange(1, 5)):
                    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
                return bytes(flipped)

    def text(self, name: str) -> str:
        """A text for the field *name*."""
        chance = self._chance
        if chance.random() < 0.6:
            heard = self._heard.like(name, chance)
            if isinstance(heard, str):
                return heard
        if chance.random() < self._large:
            return chance.choice("xé/") * _LARGE_BYTES
        if chance.random() < 0.6:
            return chance.choice(HOSTILE_TEXTS)
        return "".join(
            chr(chance.choice((97, 47, 46, 0x20, 0x7F, 0xE9, 0x2028, 0x1F600))) for _ in range(self._length())
        )

    def number(self, least: int, most: int) -> int:
        """A whole number within bounds."""
        chance = self._chance
        number = chance.choice(_NUMBERS) if chance.random() < 0.7 else chance.randint(least, most)
        if chance.random() < 0.1:
            number = -number
        return min(max(number, least), most)

    def _length(self) -> int:
        return self._chance.randrange(self._chance.choice(_TEXT_BYTES) + 1)

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self._chance.random() < (0.8 if depth < 2 else 0.3):
                self._set(message, field, depth)

    def _change(self, message: Message) -> None:
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if fields:
            field = self._chance.choice(fields)
            message.ClearField(field.name)
            if self._chance.random() < 0.9:
                self._set(message, field, depth=1)

    def _set(self, message: Message, field: Any, depth: int) -> None:
        self.fields[field.full_name] += 1
        if not field.is_repeated:
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                self._fill_or_recall(getattr(message, field.name), depth)
            else:
                setattr(message, field.name, self._scalar(field))
            return
        count = self._chance.choice((0, 1, 2, 3, 20))
        if self._chance.random() < self._large:
            count = 20_000
        values = getattr(message, field.name)
        for _ in range(count):
            if field.type != FieldDescriptor.TYPE_MESSAGE:
                values.append(self._scalar(field))
            elif _is_map(field):
                key, value = field.message_type.fields
                values[self._scalar(key)] = self._scalar(value)
            else:
                self._fill_or_recall(values.add(), depth)

    def _fill_or_recall(self, message: Message, depth: int) -> None:
        known = self._heard.request(message.DESCRIPTOR, self._chance)
        if known is not None and self._chance.random() < 0.6:
            message.MergeFromString(known)
            message.SetInParent()
        else:
            self._fill(message, depth + 1)

    def _scalar(self, field: Any) -> Any:
        makers: Mapping[int, Callable[[], Any]] = {
            FieldDescriptor.TYPE_STRING: lambda: self.text(field.name),
            FieldDescriptor.TYPE_BYTES: self._bytes,
            FieldDescriptor.TYPE_BOOL: lambda: self._chance.random() < 0.5,
            FieldDescriptor.TYPE_DOUBLE: lambda: self._chance.choice(_DOUBLES),
            FieldDescriptor.TYPE_FLOAT: lambda: self._chance.choice(_DOUBLES),
        }
        if field.type in makers:
            return makers[field.type]()
        heard = self._heard.like(field.name, self._chance)
        if isinstance(heard, int) and self._chance.random() < 0.5:
            return heard
        if field.enum_type is not None and self._chance.random() < 0.8:
            return self._chance.choice(field.enum_type.values).number
        return self.number(*_INTEGERS[field.type])  # a type that is not in the table fails here: add it

    def _bytes(self) -> bytes:
        chance = self._chance
        if chance.random() < self._large:
            return bytes(_LARGE_BYTES)
        if chance.random() < 0.3:
            return chance.randbytes(self._length())
        rising, at = [], 0
        for _ in range(chance.randrange(12)):
            at = (at + chance.choice((0, 1, 4, 8, 64, 4096, 2**62))) % 2**64
            rising.append(at)
        return b"".join(map(_COLUMN.pack, rising))


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
