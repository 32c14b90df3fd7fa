"""Running `nft`: rules go in through standard input, whole sets of them at once or not at all."""

import json
import shutil
import subprocess
from typing import Any

from forkypig.errors import InternalError, NotPossibleNow

# nft is done in 10 ms; with hundreds of slots being made on two busy cores it waits for its turn.
TIMEOUT_S = 60.0

MISSING = "the program «nft» is missing, which machines' networks need: install nftables, or use user-mode networking"


def load(rules: str) -> None:
    """Applies rules in this thread's namespace, atomically. NotPossibleNow without nft, InternalError for bad ones."""
    result = _run(["-f", "-"], rules)
    if result.returncode != 0:
        raise InternalError(f"nft refused our rules: {result.stderr.strip()[:500]}")


def tables() -> set[str]:
    """The tables of this thread's namespace, as "inet forky"."""
    return {line.removeprefix("table ") for line in _run(["list", "tables"], None).stdout.splitlines()}


def elements(kind: str, table: str, name: str) -> list[Any]:
    """The elements of a "map" or "set" of the table inet TABLE, as nft's JSON has them. Empty when it is not there."""
    result = _run(["-j", "list", kind, "inet", table, name], None)
    if result.returncode != 0:
        return []
    for entry in json.loads(result.stdout)["nftables"]:
        if kind in entry:
            found: list[Any] = entry[kind].get("elem", [])
            return found
    return []


def _run(arguments: list[str], rules: str | None) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("nft")
    if program is None:
        raise NotPossibleNow(MISSING)
    try:
        return subprocess.run(
            [program, *arguments], input=rules or "", capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise NotPossibleNow(MISSING) from error
    except subprocess.TimeoutExpired as error:
        raise NotPossibleNow(
            f"nft did not answer within {TIMEOUT_S:.0f} s: try again when the host is less busy"
        ) from error
