"""Which events may be told to whoever follows them: pure.

A sequence number is given before its transaction is committed. Where transactions overlap a later number can be seen
before an earlier one, and a follower that went on from it would never see that. Our own writers take turns, but a
follower need not rely on it: what comes after a gap is held back until the gap is filled, or the event behind it is so
old that nobody is still about to fill it. On PostgreSQL a number is also lost when its transaction is undone, and old
events are removed.
"""

from collections.abc import Sequence

from forkypig.model import Event

# Transactions with events are short: they wait for nobody.
GAP_US = 2_000_000


def told(found: Sequence[Event], after: int, now_us: int) -> Sequence[Event]:
    """Of `found`, which is all that is there after `after` in order, what can be told now."""
    for position, event in enumerate(found):
        if event.sequence != after + 1 and event.time_us > now_us - GAP_US:
            return found[:position]
        after = event.sequence
    return found


def is_wanted(kind: str, kinds: Sequence[str]) -> bool:
    """Whether a kind is among `kinds`, in full or by what it begins with: "machine" is every "machine.…"."""
    return not kinds or any(kind == each or kind.startswith(f"{each}.") for each in kinds)
