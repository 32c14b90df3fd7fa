"""The tables, for SQLite and PostgreSQL: nothing here or in the queries is one engine's alone."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from forkypig.model.access import DEFAULT_TENANT

# Constraints have names, so that a later migration can speak of them on every engine.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Only INTEGER PRIMARY KEY counts up by itself in SQLite.
_Counter = BigInteger().with_variant(Integer, "sqlite")

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(14), primary_key=True),
    Column("tag", String(63)),
    Column("message", Text, nullable=False, server_default=""),
    Column("kind", String(16), nullable=False),
    Column("parent", String(14), ForeignKey("snapshots.id"), index=True),
    Column("machine", String(14)),  # which may be gone: not a foreign key
    Column("image", String(14), nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("disk_mib", BigInteger, nullable=False),
    Column("machine_type", String(64), nullable=False),
    Column("qemu_build", String(256), nullable=False),
    Column("accelerator", String(16), nullable=False),
    Column("cpu_model", String(128), nullable=False),
    Column("pause_ms", Float, nullable=False),
    Column("own_memory_bytes", BigInteger, nullable=False),
    Column("own_disk_bytes", BigInteger, nullable=False, server_default="0"),
    Column("packed", Boolean, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("removing", Boolean, nullable=False, default=False),  # nothing new may stand on it
    Column("tenant", String(63), nullable=False, server_default=DEFAULT_TENANT),
    UniqueConstraint("tenant", "tag"),
)
Index("ix_snapshots_order", snapshots.c.tenant, snapshots.c.created_us, snapshots.c.id)  # pages

machines = Table(
    "machines",
    metadata,
    Column("id", String(14), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("state", String(16), nullable=False),
    Column("image", String(14), nullable=False),
    Column("image_name", String(63), nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("disk_mib", BigInteger, nullable=False),
    Column("snapshot", String(14), ForeignKey("snapshots.id"), index=True),
    Column("parent", String(14)),  # which may be gone: not a foreign key
    Column("qemu_pid", Integer),
    Column("address", String(64)),
    Column("failure", Text, nullable=False),
    Column("accelerator", String(16), nullable=False),
    Column("accelerator_reason", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("config", Text, nullable=False, server_default="{}"),  # JSON object: model.MachineConfig
    Column("pool", String(14), index=True),  # it waits there; written by store/pools.py alone
    Column("tenant", String(63), nullable=False, server_default=DEFAULT_TENANT),
    UniqueConstraint("tenant", "name"),
)
Index("ix_machines_order", machines.c.tenant, machines.c.created_us, machines.c.id)  # pages

# A mirror of what the host has: machines keep their image's name while the host is away.
images = Table(
    "images",
    metadata,
    Column("id", String(14), primary_key=True),
    Column("name", String(63), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("kernel", String(128), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("description", Text, nullable=False),
    Column("forget_files", JSON, nullable=False, server_default="[]"),
)

# Accelerator and QEMU build are in the snapshot: a template of others is replaced.
templates = Table(
    "templates",
    metadata,
    Column("image", String(14), primary_key=True),
    Column("cpus", Integer, primary_key=True, autoincrement=False),
    Column("memory_mib", BigInteger, primary_key=True, autoincrement=False),
    Column("disk_mib", BigInteger, primary_key=True, autoincrement=False),
    Column("snapshot", String(14), ForeignKey("snapshots.id"), nullable=False, unique=True),
)

operations = Table(
    "operations",
    metadata,
    Column("id", _Counter, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("machines", Text, nullable=False),  # JSON list of ids
    Column("snapshot", String(14)),
    Column("source", String(14)),
    Column("arguments", Text, nullable=False),  # JSON object
    Column("error", Text, nullable=False),
    Column("started_us", BigInteger, nullable=False),
    Column("ended_us", BigInteger),
    # Of the call that asked for it, where that had an idempotency key; see controller/edge/retries.py.
    Column("request", String(64)),
    Column("content_sha256", String(64)),
    Column("tenant", String(63), nullable=False, server_default=DEFAULT_TENANT),
    Column("owner", BigInteger),  # the fencing number of the controller that is at it, where several share a database
)
Index("ix_operations_status", operations.c.status)
Index("ix_operations_request", operations.c.request, unique=True)

# What was answered to requests with an idempotency key.
answers = Table(
    "answers",
    metadata,
    Column("request", String(64), primary_key=True),
    Column("content_sha256", String(64), nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("time_us", BigInteger, nullable=False, index=True),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("tenant", String(63), nullable=False, index=True),
    Column("role", String(16), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),  # 0 in this and the others: never
    Column("last_used_us", BigInteger, nullable=False),
    Column("revoked_us", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
)
Index("ix_operations_tenant", operations.c.tenant, operations.c.started_us)

events = Table(
    "events",
    metadata,
    Column("sequence", _Counter, primary_key=True),
    Column("time_us", BigInteger, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("subject", String(63), nullable=False),
    Column("detail", Text, nullable=False),
    Column("tenant", String(63), nullable=False, server_default=DEFAULT_TENANT),
    sqlite_autoincrement=True,  # a number is never given twice, also after the newest were removed
)

pools = Table(
    "pools",
    metadata,
    Column("id", String(14), primary_key=True),
    Column("tenant", String(63), nullable=False, server_default="default"),
    Column("name", String(63), nullable=False),
    Column("source", String(128), nullable=False),
    Column("from_image", Boolean, nullable=False),
    Column("image", String(14), nullable=False),
    Column("snapshot", String(14)),  # the host may lose it: not a foreign key
    Column("cpus", Integer, nullable=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("disk_mib", BigInteger, nullable=False),
    Column("config", Text, nullable=False, server_default="{}"),  # JSON object: model.MachineConfig
    Column("target", Integer, nullable=False),
    Column("most", Integer, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("removing", Boolean, nullable=False, default=False),
    UniqueConstraint("tenant", "name"),
)

pool_leases = Table(
    "pool_leases",
    metadata,
    Column("machine", String(14), ForeignKey("machines.id", ondelete="CASCADE"), primary_key=True),
    Column("pool", String(14), nullable=False),  # which may be gone: not a foreign key
    Column("pool_name", String(63), nullable=False),
    Column("tenant", String(63), nullable=False, server_default="default"),
    Column("holder", String(128), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("ttl_s", Float, nullable=False),
    Column("acquired_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("created_us", BigInteger, nullable=False),
    # The quota; NULL: no limit.
    Column("machines", Integer),
    Column("cpus", Integer),
    Column("memory_mib", BigInteger),
    Column("disk_mib", BigInteger),
    Column("snapshots", Integer),
    Column("forks_per_minute", Integer),
    Column("ksm", Boolean, nullable=False, server_default=false()),
)

# Whom a snapshot is shared with, besides its own tenant; "*": every tenant, also those to come.
shares = Table(
    "shares",
    metadata,
    Column("snapshot", String(14), ForeignKey("snapshots.id"), primary_key=True),
    Column("tenant", String(63), primary_key=True),
)

# Images that came with a tenant's import: of no other tenant's. An image without a row is everybody's.
image_owners = Table(
    "image_owners",
    metadata,
    Column("image", String(14), primary_key=True),  # which may be gone: not a foreign key
    Column("tenant", String(63), primary_key=True),
)

# Who of the controllers that share a database is alive ("controller/NAME"), and which of them reconciles ("reconcile").
leases = Table(
    "leases",
    metadata,
    Column("name", String(300), primary_key=True),
    Column("holder", String(280), nullable=False),  # the controller's name
    Column("fencing", BigInteger, nullable=False),  # grows with every holder, over all leases
    Column("expires_us", BigInteger, nullable=False),  # by the database's clock
    Column("wanted", Boolean, nullable=False, default=False),  # somebody asks the holder to look
)
