"""Tokens, the answers that are kept for retries, and which request an operation belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
        sa.Column("last_used_us", sa.BigInteger, nullable=False),
        sa.Column("revoked_us", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
    )
    op.create_table(
        "answers",
        sa.Column("request", sa.String(64), primary_key=True),
        sa.Column("content_sha256", sa.String(64), nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("time_us", sa.BigInteger, nullable=False, index=True),
    )
    op.add_column("operations", sa.Column("request", sa.String(64)))
    op.add_column("operations", sa.Column("content_sha256", sa.String(64)))
    op.create_index("ix_operations_request", "operations", ["request"], unique=True)


def downgrade() -> None:
    op.drop_index("ix_operations_request", "operations")
    op.drop_column("operations", "content_sha256")
    op.drop_column("operations", "request")
    op.drop_table("answers")
    op.drop_table("tokens")
