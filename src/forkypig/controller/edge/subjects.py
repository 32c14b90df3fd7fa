"""What a call is about, for the audit log: ids and names out of its request and its answer, and nothing else.

Only fields that are named here are looked at, so a secret in a field that somebody adds later stays out.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.message import Message

# Of requests: what people call things.
_NAMED = frozenset(
    (
        *("machine", "snapshot", "source", "image", "name", "tag", "name_prefix", "keep_tag", "before", "after"),
        *("count", "pool", "tenant", "with_tenant", "role", "token"),
    )
)
_WITHIN = ("start", "options")  # messages that a streamed request begins with
_MOST_CHARACTERS = 128
_TOKEN = re.compile(r"(fp_[0-9a-f]{0,12})\S*")


def about(request: Message, *, commands: bool = False) -> str:
    """As in "machine=web tag=clean". `commands`: with the words of a command."""
    return " ".join(f"{name}={text}" for name, text in _named(request, commands))


def _named(request: Message, commands: bool) -> Iterator[tuple[str, str]]:
    for field, value in request.ListFields():
        if field.name in _WITHIN and isinstance(value, Message):
            yield from _named(value, commands)
        elif field.name in _NAMED and isinstance(value, str | int):
            yield field.name, _fit(str(value))
        elif field.name == "url" and isinstance(value, str):
            yield "url", _fit(_bare(value))
        elif field.name == "argv" and commands:
            yield "argv", repr([str(word) for word in value])[: 8 * _MOST_CHARACTERS]


def made(answer: Message) -> str:
    """The ids of what an answer tells of: of one thing, or of children."""
    return " ".join(_ids(answer))


def is_last(message: Message) -> bool:
    """Whether a stream's message is what the caller waited for: many leave when they have it."""
    fields = message.DESCRIPTOR.fields_by_name
    return any(
        fields[name].message_type is not None and message.HasField(name)
        for name in ("result", "machine", "image", "exit")
        if name in fields
    )


def _ids(answer: Any) -> Iterator[str]:
    fields = answer.DESCRIPTOR.fields_by_name
    if "id" in fields:
        yield str(answer.id)
        return
    for name in ("result", "machine", "snapshot", "token", "image"):
        if name in fields and fields[name].message_type is not None and answer.HasField(name):
            yield from _ids(getattr(answer, name))
    if "children" in fields:
        for child in answer.children:
            yield from _ids(child)


def _fit(text: str) -> str:
    """Short, and without a token, should somebody have written one where a name belongs."""
    text = _TOKEN.sub(r"\1…", text)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _bare(url: str) -> str:
    """Without user, password, query."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return ""
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path
