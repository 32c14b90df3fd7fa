"""The schema's versions: what a database is at, and the migrations to the newest.

Alembic takes 0.2 s to import, so it is, only where there is something to migrate.
"""

from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection

from forkypig.errors import NotPossibleNow

_MIGRATIONS = Path(__file__).parent.parent / "migrations"
_AT = text("SELECT version_num FROM alembic_version")


def newest() -> str:
    """The version that the migrations lead to: their files are called rVERSION_WORDS.py, and follow one another."""
    return max(path.stem for path in (_MIGRATIONS / "versions").glob("r*.py"))[1:].partition("_")[0]


def upgrade(connection: Connection, revision: str = "") -> None:
    """Runs the migrations on a connection, in its transaction; "": up to the newest. Raises NotPossibleNow for a
    database that a newer Forky Pig has written."""
    if _version(connection) == (revision or newest()):
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision or "head")
    except CommandError as error:
        raise NotPossibleNow(
            f"the controller's database was written by another version of Forky Pig ({error}): install that one, or "
            "put a backup in its place"
        ) from error


def _version(connection: Connection) -> str:
    """What a database is at; "": a new one, or one that alembic is to judge."""
    if not inspect(connection).has_table("alembic_version"):
        return ""
    rows = connection.execute(_AT).scalars().all()
    return rows[0] if len(rows) == 1 else ""
