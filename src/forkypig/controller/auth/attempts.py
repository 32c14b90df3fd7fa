"""Log-ins that fail, counted by where they come from: past a number of them that place is sent away before anything is
looked up for it.

A token has 256 random bits, so this is not what keeps guesses out. It keeps whoever guesses from taking the database's
time, and the audit log's room. Behind one address there may be many callers (NAT, a proxy): who has come in from there
with the same credentials lately still does.
"""

import hashlib
import time

from forkypig.core.rate import Rates
from forkypig.errors import TooManyRequests

_MOST_KNOWN = 10_000  # credentials that came in lately; the one that did so longest ago goes first


class Attempts:
    """Of one controller."""

    def __init__(self, failures_per_minute: int) -> None:
        """0: any number."""
        self._rates = Rates(failures_per_minute / 60, failures_per_minute)
        self._known: dict[bytes, None] = {}

    def check(self, place: str, credentials: str) -> None:
        """Before a look-up. Raises TooManyRequests."""
        wait_s = self._rates.wait_s(place, time.monotonic())
        if wait_s and _digest(place, credentials) not in self._known:
            raise TooManyRequests(wait_s)

    def failed(self, place: str, credentials: str) -> None:
        """Nobody is known by these."""
        self._known.pop(_digest(place, credentials), None)
        self._rates.take(place, time.monotonic())

    def succeeded(self, place: str, credentials: str) -> None:
        """Somebody is."""
        digest = _digest(place, credentials)
        self._known.pop(digest, None)
        self._known[digest] = None
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]


def place_of(peer: str) -> str:
    """Where a call comes from, without its port. `peer`: as gRPC names it, "ipv4:192.0.2.1:50000"."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _digest(place: str, credentials: str) -> bytes:
    return hashlib.blake2b(f"{place}\0{credentials}".encode(errors="replace"), digest_size=16).digest()
