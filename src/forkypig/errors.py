"""Every error that a user of Forky Pig can meet, named for what the caller can do about it.

    ForkyError
    ├── InvalidRequest       the request can never succeed as it is: correct it
    ├── NotFound             the named thing is not there
    ├── AlreadyExists        the name is taken: choose another
    ├── NotPossibleNow       right request, wrong state: change the state first
    │   └── Busy             another operation is under way: try again when it is done
    ├── ResourceExhausted    memory, disk, processes or files ran out: free some
    │   └── TooManyRequests  calls come faster than this caller may make them: wait
    ├── Unauthenticated      no valid token or certificate came with the call
    ├── PermissionDenied     the caller's role does not suffice
    ├── Damaged              what is stored is not what was written: fetch it again
    ├── GuestUnresponsive    the machine runs but its agent does not answer
    ├── MachineFailed        QEMU died or refused
    ├── HostUnreachable      a daemon can't be reached: `forky up`
    ├── DeadlineExceeded     it took longer than allowed
    └── InternalError        a defect of ours

A message is one sentence or two for a person: what it is about, what is wrong, what to do next.
"""

import contextlib
import errno
from collections.abc import Iterator

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class ForkyError(Exception):
    """The root of all our errors. `str()` is fit for a user."""


class InvalidRequest(ForkyError):
    """The request can never succeed as it is."""


class NotFound(ForkyError):
    """The thing that was named is not there."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        """`kind` is "machine", "snapshot", …; `hint` says what to do next."""
        self.kind, self.name = kind, name
        super().__init__(f"there is no {kind} «{name}»" + (f": {hint}" if hint else ""))


class AlreadyExists(ForkyError):
    """The name is taken."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"a {kind} named «{name}» exists already: choose another name or remove it first")


class NotPossibleNow(ForkyError):
    """The thing is in a state that does not allow the operation."""


class Busy(NotPossibleNow):
    """Another operation is under way on the same thing."""

    def __init__(self, subject: str, operation: str) -> None:
        """`operation` is what goes on there, as in «busy: forking»."""
        self.subject, self.operation = subject, operation
        super().__init__(f"{subject} is busy: {operation}; try again when that is done")


class ResourceExhausted(ForkyError):
    """The host has not enough memory, disk, processes or open files."""


class TooManyRequests(ResourceExhausted):
    """Calls come faster than this caller may make them."""

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"too many requests: try again in {retry_after_s:.2f} s, or ask for a higher limit")


class Unauthenticated(ForkyError):
    """No valid token or certificate came with the call. Says nothing of what about it was wrong: that would help to
    guess."""

    def __init__(self) -> None:
        super().__init__(
            "this call needs a valid token or client certificate: have one made with `forky auth token create`, "
            "and set FORKY_TOKEN to it"
        )


def full_disk() -> ResourceExhausted:
    """What is said where a disk of ours is full."""
    return ResourceExhausted("the disk is full: free space below FORKY_HOME and try again")


@contextlib.contextmanager
def full_disk_told() -> Iterator[None]:
    """Turns the OSError of a full disk into ResourceExhausted; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise full_disk() from error


class PermissionDenied(ForkyError):
    """The caller is known, and may not do this."""


class Damaged(ForkyError):
    """Something stored or fetched is not what was written: truncated, altered, or of a format that we don't read."""


class GuestUnresponsive(ForkyError):
    """The machine runs, but its agent does not answer."""


class MachineFailed(ForkyError):
    """QEMU died or refused what it was asked."""


class HostUnreachable(ForkyError):
    """A daemon of ours can't be reached."""


class DeadlineExceeded(ForkyError):
    """The operation took longer than it was allowed to."""


class InternalError(ForkyError):
    """A defect of Forky Pig; the daemons' logs say more."""
