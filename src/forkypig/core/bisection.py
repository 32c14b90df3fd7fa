"""Bisection: which of a chain of snapshots is the first bad one, by trying as few as can be. Pure: verdicts in,
the next to try out. As git bisect does it, without git's branches: a snapshot has one parent."""

from collections.abc import Sequence
from enum import Enum

from forkypig.errors import InvalidRequest
from forkypig.model import Snapshot

# What `git bisect run` says about exit codes: a command that can't tell leaves by this one.
SKIP_CODE = 125


class Verdict(Enum):
    """What one try has shown."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"  # nothing


def verdict_of(exit_code: int) -> Verdict:
    """0 is good, 125 says nothing, all else is bad."""
    if exit_code == SKIP_CODE:
        return Verdict.SKIP
    return Verdict.GOOD if exit_code == 0 else Verdict.BAD


def between(history: Sequence[Snapshot], good: Snapshot, bad: Snapshot) -> list[Snapshot]:
    """The snapshots after `good` up to `bad`, oldest first, of a history that is newest first.

    Raises InvalidRequest where `bad` is not in the history, or `good` is no ancestor of `bad`."""
    ids = [each.id for each in history]
    if bad.id not in ids:
        raise InvalidRequest(f"the bad snapshot {_called(bad)} is not in this history: see forky log")
    if good.id == bad.id:
        raise InvalidRequest(f"{_called(bad)} can't be good and bad: name an earlier one as good")
    after = ids[ids.index(bad.id) :]
    if good.id not in after:
        raise InvalidRequest(
            f"the good snapshot {_called(good)} is no ancestor of the bad one {_called(bad)}: see forky log"
        )
    return list(reversed(history[ids.index(bad.id) : ids.index(good.id)]))


def _called(snapshot: Snapshot) -> str:
    return f"«{snapshot.tag}»" if snapshot.tag else snapshot.id


class Bisection:
    """The state of a search. The last of the candidates is known to be bad, what is before the first to be good."""

    def __init__(self, candidates: Sequence[Snapshot]) -> None:
        """`candidates`: oldest first, at least one."""
        self._left = list(candidates)
        self._skipped: set[str] = set()

    @property
    def suspects(self) -> list[Snapshot]:
        """Those of which one is the first bad one, oldest first."""
        return list(self._left)

    def next(self) -> Snapshot | None:
        """The one to try now: of those that can halve what is left, the one nearest to the middle. None: nothing more
        can be found out."""
        middle = len(self._left) // 2 - 1
        tried = [at for at in range(len(self._left) - 1) if self._left[at].id not in self._skipped]
        return self._left[min(tried, key=lambda at: (abs(at - middle), at))] if tried else None

    def steps(self) -> int:
        """About how many tries are still to come."""
        return (len(self._left) - 1).bit_length() if self.next() is not None else 0

    def tell(self, snapshot: Snapshot, verdict: Verdict) -> None:
        """What trying `snapshot` has shown."""
        at = next(at for at, each in enumerate(self._left) if each.id == snapshot.id)
        if verdict is Verdict.SKIP:
            self._skipped.add(snapshot.id)
        elif verdict is Verdict.BAD:
            self._left = self._left[: at + 1]
        else:
            self._left = self._left[at + 1 :]
