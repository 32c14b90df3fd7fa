"""Snapshots that leave and arrive, and the upkeep of the store: what of it is hostd's. The work itself is done by
`forkypig.archive`, in processes of their own.

A snapshot that has arrived is in the store, whole, before it becomes a record here; one whose record was never written
is an orphan that `collect` takes.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from forkypig.errors import Busy, NotPossibleNow
from forkypig.hostd.archive_worker import MovedChunks, Result, Said, work
from forkypig.hostd.packing import pack
from forkypig.hostd.records import SnapshotPhase, SnapshotRecord
from forkypig.model import ImageId, Progress, Shape, Snapshot, SnapshotId, SnapshotKind
from forkypig.model.ids import is_id
from forkypig.qemu.command import Hardware

if TYPE_CHECKING:
    from forkypig.hostd.host import Host

log = structlog.get_logger()


class Transfers:
    """One host's."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._arriving = 0  # imports and pulls under way

    # -- leaving -------------------------------------------------------------------------------------------------------

    async def export(self, snapshot: SnapshotId, *, with_image: bool) -> AsyncGenerator[Said, None]:
        """Progress, the head, the data. Raises NotFound, NotPossibleNow, Damaged."""
        async for progress in self._pack(snapshot):
            yield progress
        told: dict[str, Any] = {"snapshot": snapshot, "about": self._about(snapshot), "with_image": with_image}
        async with aclosing(work(self._host.settings, "export", **told)) as saying:
            async for said in saying:
                yield said

    async def push(
        self, snapshot: SnapshotId, url: str, environment: Mapping[str, str]
    ) -> AsyncGenerator[Progress | tuple[Snapshot, Mapping[str, Any]], None]:
        """Progress, then the snapshot and what was done."""
        async for progress in self._pack(snapshot):
            yield progress
        told: dict[str, Any] = {
            "snapshot": snapshot,
            "about": self._about(snapshot),
            "url": url,
            "environment": dict(environment),
        }
        async with aclosing(work(self._host.settings, "push", **told)) as saying:
            async for said in saying:
                if isinstance(said, Progress):
                    yield said
                elif isinstance(said, Result):
                    log.info("pushed", snapshot=snapshot, url=url, **said.fields)
                    yield self._host.snapshot(snapshot).snapshot, said.fields

    async def _pack(self, snapshot: SnapshotId) -> AsyncGenerator[Progress, None]:
        """It is durable when this ends."""
        self._host.snapshot(snapshot)
        async for progress in pack(self._host, snapshot):
            yield progress
        if not self._host.snapshot(snapshot).is_durable:
            raise NotPossibleNow(f"snapshot {snapshot} can't be packed now: see forky log {snapshot}")

    def _about(self, snapshot: SnapshotId) -> dict[str, Any]:
        """What the manifest does not say."""
        record = self._host.snapshot(snapshot)
        known = record.snapshot
        return {
            "network": record.hardware.network,
            "mtu": record.hardware.mtu,
            "tag": known.tag,
            "message": known.message,
            "pause_ms": known.pause_ms,
            "created_us": known.created_us,
            "own_memory_bytes": known.own_memory_bytes,
            "own_disk_bytes": known.own_disk_bytes,
            "forget_files": list(self._host.images.forget_files(known.image)),
        }

    # -- arriving ------------------------------------------------------------------------------------------------------

    async def import_(
        self, file: AsyncIterator[bytes], trusted: bytes
    ) -> AsyncGenerator[Progress | tuple[Snapshot, Mapping[str, Any]], None]:
        """Progress, then the snapshot and what was done."""
        told: dict[str, Any] = {"trusted": base64.b64encode(trusted).decode()}
        async with aclosing(self._arrive("import", feed=file, **told)) as arriving:
            async for said in arriving:
                yield said

    async def pull(
        self, url: str, name: str, environment: Mapping[str, str]
    ) -> AsyncGenerator[Progress | tuple[Snapshot, Mapping[str, Any]], None]:
        """Progress, then the snapshot and what was done."""
        told: dict[str, Any] = {"url": url, "name": name, "environment": dict(environment)}
        async with aclosing(self._arrive("pull", **told)) as arriving:
            async for said in arriving:
                yield said

    async def _arrive(
        self, do: str, *, feed: AsyncIterator[bytes] | None = None, **told: Any
    ) -> AsyncGenerator[Progress | tuple[Snapshot, Mapping[str, Any]], None]:
        self._arriving += 1
        try:
            known = list(self._host.snapshots)
            async with aclosing(work(self._host.settings, do, feed=feed, known=known, **told)) as saying:
                async for said in saying:
                    if isinstance(said, Progress):
                        yield said
                    elif isinstance(said, Result):
                        # To its end, though the caller goes away: else what has arrived would be nobody's.
                        taking = asyncio.create_task(self._take_up(said.fields), name="take-up")
                        self._host.keep(taking)
                        yield await asyncio.shield(taking), said.fields
        finally:
            self._arriving -= 1

    async def _take_up(self, arrived: Mapping[str, Any]) -> Snapshot:
        """Makes a snapshot that is in the store one of this host's."""
        host, snapshot = self._host, SnapshotId(arrived["snapshot"])
        if (here := host.snapshots.get(snapshot)) is not None:
            about = arrived["about"]
            return replace(here.snapshot, tag=here.snapshot.tag or about["tag"])
        record = _record(host, arrived)
        base = host.chains.image_disk(record.snapshot.image)
        await host.pager.open(snapshot, record.snapshot.shape.memory_mib << 20, record.memory, base)
        # Without the tag: whether that is free the controller knows.
        host.save_snapshot(replace(record, snapshot=replace(record.snapshot, tag="")))
        await asyncio.to_thread(host.snapshot_ledger.sync, snapshot)
        log.info("arrived", snapshot=snapshot, chunks=arrived["chunks"], bytes=arrived["bytes"])
        return record.snapshot

    # -- the store -----------------------------------------------------------------------------------------------------

    async def remote(self, url: str, environment: Mapping[str, str]) -> list[Mapping[str, Any]]:
        """What is in an object store."""
        found: list[Mapping[str, Any]] = []
        async with aclosing(work(self._host.settings, "list", url=url, environment=dict(environment))) as saying:
            async for said in saying:
                if isinstance(said, Result):
                    found = said.fields["snapshots"]
        return found

    async def collect(self, *, dry_run: bool) -> AsyncGenerator[Said, None]:
        """Progress, then what was done. Raises Busy while something arrives, Damaged."""
        if self._arriving and not dry_run:
            raise Busy("the store", "a snapshot is being imported or pulled")
        told: asyncio.Queue[bytes] = asyncio.Queue()
        asked: dict[str, Any] = {"dry_run": dry_run, "orphans": self._orphans()}
        async with aclosing(work(self._host.settings, "collect", feed=_each(told), **asked)) as saying:
            async for said in saying:
                if isinstance(said, MovedChunks):
                    await self._host.pager.move(said.path)
                    told.put_nowait(b"told\n")
                else:
                    yield said

    def _orphans(self) -> list[str]:
        """Snapshots in the store of which there is no record, not even one that can't be read."""
        recorded = {path.name.partition(".")[0] for path in self._host.settings.snapshots.iterdir()}
        stored = {path.stem for path in (self._host.settings.store / "manifests").glob("*.manifest")}
        return sorted(each for each in stored - recorded - set(self._host.snapshots) if is_id(each))

    async def check(self, *, deep: bool) -> AsyncGenerator[Said, None]:
        """Progress, then what was found."""
        async with aclosing(work(self._host.settings, "check", deep=deep)) as saying:
            async for said in saying:
                yield said


async def _each(queue: "asyncio.Queue[bytes]") -> AsyncGenerator[bytes, None]:
    while True:
        yield await queue.get()


def _record(host: "Host", arrived: Mapping[str, Any]) -> SnapshotRecord:
    """What was checked field by field when it came in (archive/head.py)."""
    about, needs = arrived["about"], arrived["needs"]
    snapshot, parts = SnapshotId(arrived["snapshot"]), host.maker.new_parts()
    if arrived["image"] is None:
        raise NotPossibleNow(f"snapshot {snapshot} stands on no image, and machines here need one")
    hardware = Hardware(
        machine_type=needs["machine_type"],
        accelerator=needs["accelerator"],
        cpu_model=needs["cpu_model"],
        network=about["network"],
        mtu=about["mtu"],
    )
    parent = SnapshotId(arrived["parent"]) if arrived["parent"] else None
    return SnapshotRecord(
        snapshot=Snapshot(
            id=snapshot,
            kind=SnapshotKind.KEPT,
            tag=about["tag"],
            message=about["message"],
            parent=parent,
            image=ImageId(arrived["image"]),
            shape=Shape(**arrived["shape"]),
            machine_type=needs["machine_type"],
            qemu_build=needs["qemu_build"],
            accelerator=needs["accelerator"],
            cpu_model=needs["cpu_model"],
            pause_ms=about["pause_ms"],
            own_memory_bytes=about["own_memory_bytes"],
            own_disk_bytes=about["own_disk_bytes"],
            packed=True,
            created_us=arrived["created_us"],
        ),
        phase=SnapshotPhase.PACKED,
        hardware=hardware,
        process_id=parts.process_id,  # nobody's: it was never a process here
        address=0,
        disk=parts.disk,
        devices=host.devices_path(snapshot),
        memory=parent,
        cpu=needs["cpu"],
        cpu_features=tuple(needs["cpu_features"]),
    )
