"""Snapshots have a message and the size of what was written to their disk."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("message", sa.Text, nullable=False, server_default=""))
    op.add_column("snapshots", sa.Column("own_disk_bytes", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("snapshots", "own_disk_bytes")
    op.drop_column("snapshots", "message")
