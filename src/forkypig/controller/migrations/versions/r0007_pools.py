"""Pools, the machines that wait in them, and the leases of those that are acquired."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("machines", sa.Column("pool", sa.String(14)))
    op.create_index("ix_machines_pool", "machines", ["pool"])
    op.create_table(
        "pools",
        sa.Column("id", sa.String(14), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False, server_default="default"),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("source", sa.String(128), nullable=False),
        sa.Column("from_image", sa.Boolean, nullable=False),
        sa.Column("image", sa.String(14), nullable=False),
        sa.Column("snapshot", sa.String(14)),
        sa.Column("cpus", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.BigInteger, nullable=False),
        sa.Column("disk_mib", sa.BigInteger, nullable=False),
        sa.Column("config", sa.Text, nullable=False, server_default="{}"),
        sa.Column("target", sa.Integer, nullable=False),
        sa.Column("most", sa.Integer, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("removing", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pools"),
        sa.UniqueConstraint("tenant", "name", name="uq_pools_tenant"),
    )
    op.create_table(
        "pool_leases",
        sa.Column("machine", sa.String(14), nullable=False),
        sa.Column("pool", sa.String(14), nullable=False),
        sa.Column("pool_name", sa.String(63), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False, server_default="default"),
        sa.Column("holder", sa.String(128), nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("ttl_s", sa.Float, nullable=False),
        sa.Column("acquired_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("machine", name="pk_pool_leases"),
        sa.ForeignKeyConstraint(["machine"], ["machines.id"], name="fk_pool_leases_machine", ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("pool_leases")
    op.drop_table("pools")
    op.drop_index("ix_machines_pool", "machines")
    op.drop_column("machines", "pool")
