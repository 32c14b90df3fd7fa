"""Everything belongs to a tenant: what was there, to «default». Names and tags are unique within a tenant."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.String(63), nullable=False, server_default="default")


def _tables() -> None:
    tenants = op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("machines", sa.Integer),
        sa.Column("cpus", sa.Integer),
        sa.Column("memory_mib", sa.BigInteger),
        sa.Column("disk_mib", sa.BigInteger),
        sa.Column("snapshots", sa.Integer),
        sa.Column("forks_per_minute", sa.Integer),
        sa.Column("ksm", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.bulk_insert(tenants, [{"name": "default", "created_us": time.time_ns() // 1000}])
    op.create_table(
        "shares",
        sa.Column("snapshot", sa.String(14), sa.ForeignKey("snapshots.id", name="fk_shares_snapshot"), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("snapshot", "tenant", name="pk_shares"),
    )
    op.create_table(
        "image_owners",
        sa.Column("image", sa.String(14), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("image", "tenant", name="pk_image_owners"),
    )


def upgrade() -> None:
    for table in ("operations", "events"):
        op.add_column(table, _tenant())
    op.create_index("ix_operations_tenant", "operations", ["tenant", "started_us"])
    for table, column in (("snapshots", "tag"), ("machines", "name")):
        with op.batch_alter_table(table) as batch:
            batch.add_column(_tenant())
            batch.drop_constraint(f"uq_{table}_{column}", type_="unique")
            batch.create_unique_constraint(f"uq_{table}_tenant", ["tenant", column])
    _tables()


def downgrade() -> None:
    for table in ("image_owners", "shares", "tenants"):
        op.drop_table(table)
    for table, column in (("snapshots", "tag"), ("machines", "name")):
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(f"uq_{table}_tenant", type_="unique")
            batch.create_unique_constraint(f"uq_{table}_{column}", [column])
            batch.drop_column("tenant")
    op.drop_index("ix_operations_tenant", "operations")
    for table in ("operations", "events"):
        op.drop_column(table, "tenant")
