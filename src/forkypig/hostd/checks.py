"""One line of `forky doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """A requirement: what was found, and what to do about it (empty when all is well)."""

    name: str
    verdict: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Check:
    """All is well."""
    return Check(name, "ok", detail)


def warning(name: str, detail: str, remedy: str) -> Check:
    """Machines run, but slower, fewer, or with something left behind."""
    return Check(name, "warning", detail, remedy)


def failed(name: str, detail: str, remedy: str) -> Check:
    """Machines can't run until this is mended."""
    return Check(name, "failed", detail, remedy)
