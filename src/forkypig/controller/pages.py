"""Pages of a list that is ordered by time of creation and id: a token names the last one that was given.

What is made while somebody turns the pages comes at the end, what is removed is left out, nothing comes twice.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from forkypig.errors import InvalidRequest

MOST = 10_000
_TOKEN = re.compile(r"([0-9]{1,18})/([a-z]-[0-9a-f]{1,12})")


class _Listed(Protocol):
    @property
    def created_us(self) -> int: ...
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Listed)
After = tuple[int, str]


async def paged(
    read: Callable[[int, After | None], Awaitable[list[T]]], page_size: int, page_token: str
) -> tuple[list[T], str]:
    """A page, and the token of the next; "" after the last. `read(limit, after)` gives at most `limit`, 0: all.

    Raises InvalidRequest."""
    if page_size > MOST:
        raise InvalidRequest(f"a page has at most {MOST} entries, not {page_size}: ask for fewer")
    after = _parse(page_token) if page_token else None
    # One more is read than is given: that tells whether there is another page.
    found = await read(page_size + 1 if page_size else 0, after)
    if not page_size or len(found) <= page_size:
        return found, ""
    last = found[page_size - 1]
    return found[:page_size], f"{last.created_us}/{last.id}"


def _parse(token: str) -> After:
    if (match := _TOKEN.fullmatch(token)) is None:
        raise InvalidRequest("the page token is not one that an answer had: begin again with the first page")
    return int(match[1]), match[2]
