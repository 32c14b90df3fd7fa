"""Checks, without a network, that requirements.txt pins everything that pyproject.toml asks for.

It does not find a lock that could be newer: `make lock` makes one.
"""

import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]


def pins(lock: str) -> dict[str, list[str]]:
    """Name -> pinned versions; there are several when Python versions need different ones."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, re.MULTILINE):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


def unmet(wanted: list[str], pinned: dict[str, list[str]]) -> list[str]:
    """The requirements that no pin satisfies."""
    requirements = [Requirement(line) for line in wanted]
    return [
        str(requirement)
        for requirement in requirements
        if not any(requirement.specifier.contains(v, True) for v in pinned.get(canonicalize_name(requirement.name), []))
    ]


def main() -> int:
    """0 when the lock is complete."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    wanted += project["build-system"]["requires"]
    missing = unmet(wanted, pins((CHECKOUT / "requirements.txt").read_text()))
    for requirement in missing:
        print(f"requirements.txt has nothing for «{requirement}» of pyproject.toml: run `make lock`", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
