"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _shape() -> tuple[sa.Column[int], ...]:
    return (
        sa.Column("cpus", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.BigInteger, nullable=False),
        sa.Column("disk_mib", sa.BigInteger, nullable=False),
    )


def _snapshots() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(14), nullable=False),
        sa.Column("tag", sa.String(63)),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("parent", sa.String(14), sa.ForeignKey("snapshots.id", name="fk_snapshots_parent")),
        sa.Column("machine", sa.String(14)),
        sa.Column("image", sa.String(14), nullable=False),
        *_shape(),
        sa.Column("machine_type", sa.String(64), nullable=False),
        sa.Column("qemu_build", sa.String(256), nullable=False),
        sa.Column("accelerator", sa.String(16), nullable=False),
        sa.Column("cpu_model", sa.String(128), nullable=False),
        sa.Column("pause_ms", sa.Float, nullable=False),
        sa.Column("own_memory_bytes", sa.BigInteger, nullable=False),
        sa.Column("settled", sa.Boolean, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("removing", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        sa.UniqueConstraint("tag", name="uq_snapshots_tag"),
    )
    op.create_index("ix_snapshots_parent", "snapshots", ["parent"])


def _machines() -> None:
    op.create_table(
        "machines",
        sa.Column("id", sa.String(14), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("image", sa.String(14), nullable=False),
        sa.Column("image_name", sa.String(63), nullable=False),
        *_shape(),
        sa.Column("snapshot", sa.String(14), sa.ForeignKey("snapshots.id", name="fk_machines_snapshot")),
        sa.Column("parent", sa.String(14)),
        sa.Column("qemu_pid", sa.Integer),
        sa.Column("address", sa.String(64)),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("accelerator", sa.String(16), nullable=False),
        sa.Column("accelerator_reason", sa.Text, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_machines"),
        sa.UniqueConstraint("name", name="uq_machines_name"),
    )
    op.create_index("ix_machines_snapshot", "machines", ["snapshot"])


def _images_and_templates() -> None:
    op.create_table(
        "images",
        sa.Column("id", sa.String(14), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("kernel", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
    )
    op.create_index("ix_images_name", "images", ["name"])
    op.create_table(
        "templates",
        sa.Column("image", sa.String(14), nullable=False),
        *_shape(),
        sa.Column(
            "snapshot", sa.String(14), sa.ForeignKey("snapshots.id", name="fk_templates_snapshot"), nullable=False
        ),
        sa.PrimaryKeyConstraint("image", "cpus", "memory_mib", "disk_mib", name="pk_templates"),
        sa.UniqueConstraint("snapshot", name="uq_templates_snapshot"),
    )


def upgrade() -> None:
    _snapshots()
    _machines()
    _images_and_templates()
    op.create_table(
        "operations",
        sa.Column("id", _COUNTER, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("machines", sa.Text, nullable=False),
        sa.Column("snapshot", sa.String(14)),
        sa.Column("source", sa.String(14)),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("started_us", sa.BigInteger, nullable=False),
        sa.Column("ended_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_operations"),
    )
    op.create_index("ix_operations_status", "operations", ["status"])
    op.create_table(
        "events",
        sa.Column("sequence", _COUNTER, nullable=False),
        sa.Column("time_us", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_events"),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    for table in ("events", "operations", "templates", "images", "machines", "snapshots"):
        op.drop_table(table)
