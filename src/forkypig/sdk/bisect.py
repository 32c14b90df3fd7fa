"""Bisection: runs a command in children of snapshots until the first bad snapshot is found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forkypig import errors, model
from forkypig.core.bisection import Bisection, Verdict, between, verdict_of
from forkypig.sdk.borrowed import borrowed

if TYPE_CHECKING:
    from forkypig.sdk.client import Forky

# 126 and 127: the command could not be started, which says nothing about a snapshot. `git bisect run` ends there too.
_NOT_STARTED = (126, 127)


@dataclass(frozen=True, slots=True)
class Trial:
    """One snapshot that was tried. `left`: about how many tries were still to come after it."""

    snapshot: model.Snapshot
    verdict: Verdict
    exit_code: int
    output: bytes
    left: int


@dataclass(frozen=True, slots=True)
class Bisected:
    """What a bisection found. `first_bad` is None when skipped snapshots hide it: then it is one of `suspects`."""

    first_bad: model.Snapshot | None
    suspects: tuple[model.Snapshot, ...]
    trials: tuple[Trial, ...]


OnTrial = Callable[[Trial], None]


async def bisect(
    forky: "Forky", source: str, good: str, bad: str, argv: Sequence[str], timeout_s: float, on_trial: OnTrial | None
) -> Bisected:
    """See Forky.bisect."""
    history = await forky.history(source)
    last = await forky.get_snapshot(bad) if bad else (history[0] if history else None)
    if last is None:
        raise errors.InvalidRequest(f"«{source}» stands on no snapshot: there is nothing to look through")
    search = Bisection(between(history, await forky.get_snapshot(good), last))
    trials: list[Trial] = []
    while (snapshot := search.next()) is not None:
        code, output = await _try(forky, snapshot, argv, timeout_s)
        verdict = verdict_of(code)
        search.tell(snapshot, verdict)
        trial = Trial(snapshot, verdict, code, output, search.steps())
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    suspects = search.suspects
    return Bisected(suspects[0] if len(suspects) == 1 else None, tuple(suspects), tuple(trials))


async def _try(forky: "Forky", snapshot: model.Snapshot, argv: Sequence[str], timeout_s: float) -> tuple[int, bytes]:
    """The command's exit code and output in a child, which is removed whatever happens."""
    async with borrowed(forky, snapshot.id, name=f"bisect-{snapshot.id[2:]}") as (fork,):
        result = await fork.children[0].exec(argv, timeout_s=timeout_s)
    if result.exit_code in _NOT_STARTED:
        raise errors.InvalidRequest(
            f"«{argv[0]}» could not be run in snapshot {snapshot.tag or snapshot.id} (exit code {result.exit_code}): "
            f"use a command that is there in every snapshot, and 125 for those that can't be judged"
        )
    return result.exit_code, result.stdout + result.stderr
