"""The JSON documents. Their fields are part of the interface: add, never rename."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkypig import model
    from forkypig.model.access import Principal
    from forkypig.sdk.access import Token
    from forkypig.sdk.diff import Diff
    from forkypig.sdk.file_list import FileEntry
    from forkypig.sdk.status import Check, Daemon, Status
    from forkypig.sdk.tenants import TenantInfo

Document = dict[str, Any]


def machine(info: model.Machine) -> Document:
    return {
        "id": info.id,
        "name": info.name,
        "state": info.state.value,
        "snapshot": info.snapshot,
        "image": info.image_name or info.image,
        "cpus": info.shape.cpus,
        "memory_mib": info.shape.memory_mib,
        "qemu_pid": info.qemu_pid,
        "address": info.address,
        "disk_mib": info.shape.disk_mib,
        "image_id": info.image,
        "parent": info.parent,
        "operation": info.operation or None,
        "failure": info.failure or None,
        "accelerator": info.accelerator,
        "accelerator_reason": info.accelerator_reason,
        "created_us": info.created_us,
        "expires_us": info.expires_us or None,
        "network": _network(info.config),
        "limits": _limits(info.config.limits),
        "no_fork": info.config.no_fork,
        "restart": info.config.restart.value,
        "tenant": info.tenant,
    }


def pool(status: model.PoolStatus) -> Document:
    pool = status.pool
    return {
        "id": pool.id,
        "name": pool.name,
        "from": pool.source,
        "image_id": pool.image,
        "snapshot": pool.snapshot,
        "cpus": pool.shape.cpus,
        "memory_mib": pool.shape.memory_mib,
        "disk_mib": pool.shape.disk_mib,
        "target": pool.target,
        "max": pool.max,
        "ready": status.ready,
        "filling": status.filling,
        "acquired": status.acquired,
        "waiting": status.waiting,
        "wanted": status.wanted,
        "failure": status.failure or None,
        "created_us": pool.created_us,
        "machines": [machine(each) for each in status.machines],
        "leases": [lease(each) for each in status.leases],
    }


def lease(info: model.Lease) -> Document:
    return {
        "machine": info.machine,
        "machine_name": info.machine_name,
        "pool": info.pool_name,
        "holder": info.holder,
        "labels": dict(info.labels),
        "ttl_s": info.ttl_s,
        "acquired_us": info.acquired_us,
        "expires_us": info.expires_us,
    }


def acquired(machine_info: model.Machine, held: model.Lease, waited_ms: float) -> Document:
    return {**machine(machine_info), "lease": lease(held), "waited_ms": round(waited_ms, 3)}


def tenant(info: TenantInfo) -> Document:
    found = info.tenant
    return {
        "name": found.name,
        "created_us": found.created_us,
        "quota": asdict(found.quota),
        "used": asdict(info.used),
        "ksm": found.ksm,
    }


def token(info: Token) -> Document:
    return {
        "id": info.id,
        "name": info.name,
        "tenant": info.tenant,
        "role": info.role.value,
        "created_us": info.created_us,
        "created_by": info.created_by,
        "expires_us": info.expires_us or None,
        "last_used_us": info.last_used_us or None,
        "revoked_us": info.revoked_us or None,
    }


def principal(who: Principal) -> Document:
    return {"name": who.name, "tenant": who.tenant, "role": who.role.value, "operator": who.operator}


def _network(config: model.MachineConfig) -> Document:
    policy = config.network
    return {
        "mode": policy.mode.value,
        "egress": str(policy.egress),
        "bandwidth_bytes_s": policy.bandwidth_bytes_s,
        "tcp": policy.tcp.value,
        "ports": [port(each) for each in config.ports],
    }


def _limits(limits: model.Limits) -> Document:
    return {
        "cpus": limits.cpus,
        "memory_mib": limits.memory_mib,
        "pids": limits.pids,
        "io_mib_s": limits.io_mib_s,
    }


def port(forward: model.PortForward) -> Document:
    return {
        "host_address": forward.host_address,
        "host_port": forward.host_port,
        "guest_port": forward.guest_port,
        "protocol": forward.protocol,
    }


def snapshot(info: model.Snapshot) -> Document:
    return {
        "id": info.id,
        "tag": info.tag or None,
        "message": info.message or None,
        "kind": info.kind.value,
        "parent": info.parent,
        "machine": info.machine,
        "image": info.image,
        "cpus": info.shape.cpus,
        "memory_mib": info.shape.memory_mib,
        "disk_mib": info.shape.disk_mib,
        "machine_type": info.machine_type,
        "qemu_build": info.qemu_build,
        "accelerator": info.accelerator,
        "cpu_model": info.cpu_model,
        "pause_ms": round(info.pause_ms, 3),
        "own_memory_bytes": info.own_memory_bytes,
        "own_disk_bytes": info.own_disk_bytes,
        "packed": info.packed,
        "where": "packed" if info.packed else "in memory",
        "created_us": info.created_us,
        "tenant": info.tenant,
        "shared_with": list(info.shared_with),
    }


def _file(entry: FileEntry | None) -> Document | None:
    if entry is None:
        return None
    return {
        "kind": entry.kind,
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size_bytes": entry.size_bytes,
        "modified_ns": entry.modified_ns,
        "target": entry.target or None,
    }


def diff(found: Diff) -> Document:
    return {
        "before": found.before,
        "after": found.after,
        "memory": {
            "pages": found.memory.pages,
            "total_pages": found.memory.total_pages,
            "ranges": [{"address": address, "length": length} for address, length in found.memory.ranges],
        },
        "files": [
            {
                "change": change.verb,
                "path": change.path,
                "before": _file(change.before),
                "after": _file(change.after),
                "patch": change.patch or None,
            }
            for change in found.files
        ],
    }


def image(info: model.Image) -> Document:
    return {
        "id": info.id,
        "name": info.name,
        "size_bytes": info.size_bytes,
        "kernel": info.kernel,
        "sha256": info.sha256,
        "created_us": info.created_us,
        "description": info.description,
        "forget_files": list(info.forget_files),
    }


def event(info: model.Event) -> Document:
    return {
        "sequence": info.sequence,
        "time_us": info.time_us,
        "kind": info.kind,
        "subject": info.subject,
        "detail": info.detail,
    }


def _daemon(daemon: Daemon | None) -> Document | None:
    if daemon is None:
        return None
    return {"pid": daemon.pid, "version": daemon.version, "started_us": daemon.started_us}


def status(found: Status) -> Document:
    return {
        "home": str(found.home),
        "running": found.running,
        "controller": _daemon(found.controller),
        "hostd": _daemon(found.hostd),
        "pager": _daemon(found.pager),
        "rest": _daemon(found.rest),
        "rest_address": found.rest_address or None,
        "rest_error": found.rest_error or None,
        "controller_error": found.controller_error or None,
        "hostd_error": found.hostd_error or None,
        "pager_error": found.pager_error or None,
        "accelerator": found.accelerator,
        "accelerator_reason": found.accelerator_reason,
        "network": found.network,
        "network_reason": found.network_reason,
        "qemu_version": found.qemu_version or None,
        "machines": found.machines,
        "snapshots": found.snapshots,
        "frozen_bytes": found.tiers.frozen_bytes if found.tiers else None,
        "cached_bytes": found.tiers.cached_bytes if found.tiers else None,
        "stored_bytes": found.tiers.stored_bytes if found.tiers else None,
        "chunks": found.tiers.chunks if found.tiers else None,
    }


def check(found: Check) -> Document:
    return {"name": found.name, "verdict": found.verdict.value, "detail": found.detail, "remedy": found.remedy or None}
