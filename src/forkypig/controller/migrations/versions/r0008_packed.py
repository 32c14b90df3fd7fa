"""What was called `settled` is called what it is everywhere else: packed."""

from alembic import op

revision = "0008"
down_revision = "0006"


def upgrade() -> None:
    op.alter_column("snapshots", "settled", new_column_name="packed")


def downgrade() -> None:
    op.alter_column("snapshots", "packed", new_column_name="settled")
