"""Which of the controllers that share a database writes."""

from dataclasses import dataclass

from forkypig.errors import NotPossibleNow


class Superseded(NotPossibleNow):
    """Other controllers took this one for dead, and its operations over."""

    def __init__(self) -> None:
        super().__init__(
            "this controller stood still for too long, and another has finished or undone its operations: see what "
            "became of them (forky ps), then try again"
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """A controller among those that share a database: under which name, and since which fencing number."""

    name: str
    number: int
