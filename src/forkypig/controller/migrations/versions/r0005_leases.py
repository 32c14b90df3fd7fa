"""Controllers share a database: leases, and who is at an operation. Indexes for pages of machines and snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(300), nullable=False),
        sa.Column("holder", sa.String(280), nullable=False),
        sa.Column("fencing", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.add_column("operations", sa.Column("owner", sa.BigInteger))
    if op.get_bind().dialect.name == "postgresql":
        # Names that begin alike are looked for as a range of bytes; a language's order is another.
        op.execute('ALTER TABLE machines ALTER COLUMN name TYPE varchar(63) COLLATE "C"')
    op.create_index("ix_machines_order", "machines", ["tenant", "created_us", "id"])
    op.create_index("ix_snapshots_order", "snapshots", ["tenant", "created_us", "id"])


def downgrade() -> None:
    op.drop_index("ix_snapshots_order", "snapshots")
    op.drop_index("ix_machines_order", "machines")
    op.drop_column("operations", "owner")
    op.drop_table("leases")
