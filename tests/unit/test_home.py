"""Who else may come to a home."""

from pathlib import Path

import pytest

from forkypig.daemon.home import Home


@pytest.mark.parametrize(("home", "run"), [(0o700, 0o700), (0o711, 0o700), (0o755, 0o700), (0o2755, 0o700)])
def test_a_home_that_others_only_pass_through(tmp_path: Path, home: int, run: int) -> None:
    _made(tmp_path, home, run).check_private()


@pytest.mark.parametrize(
    ("home", "run", "told"),
    [
        (0o775, 0o700, "others can write «{home}»: chmod 755"),
        (0o757, 0o700, "others can write «{home}»: chmod 755"),
        (0o700, 0o710, "others can pass through «{home}/run»: chmod 700"),
        (0o700, 0o701, "others can pass through «{home}/run»: chmod 700"),
        (0o700, 0o722, "others can write «{home}/run»: chmod 700"),
    ],
)
def test_a_home_that_is_open_is_refused(tmp_path: Path, home: int, run: int, told: str) -> None:
    with pytest.raises(ValueError, match=told.format(home=tmp_path / "h")):
        _made(tmp_path, home, run).check_private()


def test_one_that_is_not_there_yet(tmp_path: Path) -> None:
    Home(tmp_path / "h").check_private()


def _made(under: Path, home: int, run: int) -> Home:
    made = Home(under / "h")
    made.run.mkdir(parents=True)
    made.home.chmod(home)
    made.run.chmod(run)
    return made
