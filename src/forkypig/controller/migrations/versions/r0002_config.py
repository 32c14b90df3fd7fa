"""Machines have a config: network, ports, limits. Images name the files that forks of their machines forget."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # "{}" is the default config: what machines of before had.
    op.add_column("machines", sa.Column("config", sa.Text, nullable=False, server_default="{}"))
    op.add_column("images", sa.Column("forget_files", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("images", "forget_files")
    op.drop_column("machines", "config")
