"""Pools and leases, model <-> protobuf."""

from dataclasses import replace

from forkypig import model
from forkypig.model.ids import ImageId, MachineId, PoolId, SnapshotId
from forkypig.v1 import pools_pb2 as pb
from forkypig.wire import convert


def pool_to_wire(status: model.PoolStatus) -> pb.Pool:
    pool = status.pool
    return pb.Pool(
        id=pool.id,
        name=pool.name,
        source=pool.source,
        from_image=pool.from_image,
        image=pool.image,
        snapshot=pool.snapshot or "",
        shape=convert.shape_to_wire(pool.shape),
        target=pool.target,
        max=pool.max,
        created_us=pool.created_us,
        ready=status.ready,
        filling=status.filling,
        acquired=status.acquired,
        waiting=status.waiting,
        wanted=status.wanted,
        failure=status.failure,
        machines=[convert.machine_to_wire(machine) for machine in status.machines],
        leases=[lease_to_wire(lease) for lease in status.leases],
    )


def pool_from_wire(message: pb.Pool) -> model.PoolStatus:
    pool = model.Pool(
        id=PoolId(message.id),
        name=message.name,
        source=message.source,
        from_image=message.from_image,
        image=ImageId(message.image),
        snapshot=SnapshotId(message.snapshot) if message.snapshot else None,
        shape=convert.shape_from_wire(message.shape),
        target=message.target,
        max=message.max,
        created_us=message.created_us,
    )
    return model.PoolStatus(
        pool=pool,
        ready=message.ready,
        filling=message.filling,
        acquired=message.acquired,
        waiting=message.waiting,
        wanted=message.wanted,
        failure=message.failure,
        machines=tuple(convert.machine_from_wire(machine) for machine in message.machines),
        leases=tuple(lease_from_wire(lease) for lease in message.leases),
    )


def lease_to_wire(lease: model.Lease) -> pb.Lease:
    return pb.Lease(
        machine=lease.machine,
        machine_name=lease.machine_name,
        pool=lease.pool_name,
        pool_id=lease.pool,
        holder=lease.holder,
        labels=dict(lease.labels),
        ttl_s=lease.ttl_s,
        acquired_us=lease.acquired_us,
        expires_us=lease.expires_us,
    )


def lease_from_wire(message: pb.Lease) -> model.Lease:
    return model.Lease(
        machine=MachineId(message.machine),
        machine_name=message.machine_name,
        pool=PoolId(message.pool_id),
        pool_name=message.pool,
        holder=message.holder,
        labels=dict(message.labels),
        ttl_s=message.ttl_s,
        acquired_us=message.acquired_us,
        expires_us=message.expires_us,
    )


def acquired_to_wire(acquired: model.Acquired) -> pb.AcquireResponse:
    return pb.AcquireResponse(
        machine=convert.machine_to_wire(replace(acquired.machine, expires_us=acquired.lease.expires_us)),
        lease=lease_to_wire(acquired.lease),
        waited_ms=acquired.waited_ms,
        arrived_us=acquired.arrived_us,
    )
