"""One job of the packer: a snapshot's memory, disk and device state go to the store, and it is durable."""

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from forkypig.chunks import manifest_file
from forkypig.chunks.format import PAGE_BYTES, References, is_frozen, layers_of
from forkypig.chunks.manifest import BaseImage, Manifest, Needs, make_device_state
from forkypig.chunks.section import Section, make_section
from forkypig.chunks.store import Store
from forkypig.chunks.writer import Writer
from forkypig.model import SnapshotId
from forkypig.pager.disk_packer import DiskPacker
from forkypig.pager.order import PackOrder

BATCH_PAGES = 1024
_SAY_EVERY_BYTES = 16 << 20


class Source(NamedTuple):
    """A descriptor to read a frozen memory from, and where in it guest memory begins."""

    fd: int
    base: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What there is to do. `references` and the sources are descriptors, of the process that has the job."""

    snapshot: SnapshotId
    parent: str
    memory_bytes: int
    references: int
    sources: Mapping[int, Source]  # by number of the frozen layer
    order: PackOrder

    def encode(self) -> bytes:
        """As JSON."""
        return _JOB.dump_json(self)

    @classmethod
    def decode(cls, encoded: bytes) -> "Job":
        """Raises pydantic's ValidationError."""
        return _JOB.validate_json(encoded)

    @property
    def descriptors(self) -> list[int]:
        """Those that it names: of the references, then of the sources in their order."""
        return [self.references, *(source.fd for source in self.sources.values())]

    def with_descriptors(self, fds: list[int]) -> "Job":
        """The same job in a process that has these descriptors instead, in the order of `descriptors`."""
        pairs = zip(self.sources.items(), fds[1:], strict=True)
        return replace(self, references=fds[0], sources={number: Source(fd, old.base) for (number, old), fd in pairs})


_JOB = TypeAdapter(Job)


class Progress:
    """Tells what is done."""

    def __init__(self, total_bytes: int, tell: Callable[[dict[str, int]], None]) -> None:
        self.done_bytes, self.total_bytes = 0, total_bytes
        self._said = 0
        self._tell = tell

    def add(self, count: int) -> None:
        self.done_bytes += count
        if self.done_bytes - self._said >= _SAY_EVERY_BYTES:
            self._said = self.done_bytes
            self.say()

    def say(self, **more: int) -> None:
        self._tell({"done": self.done_bytes, "total": self.total_bytes, **more})


def pack_memory(writer: Writer, references: References, sources: Mapping[int, Source], progress: Progress) -> None:
    """Adds frozen pages to the store, and puts their places there in `references`."""
    frozen = np.flatnonzero(is_frozen(references))
    numbers = layers_of(references[frozen])
    buffer = bytearray(BATCH_PAGES * PAGE_BYTES)
    view = memoryview(buffer)
    for number in np.unique(numbers).tolist():
        pages = frozen[numbers == number]
        for first in range(0, len(pages), BATCH_PAGES):
            batch = pages[first : first + BATCH_PAGES]
            read_pages(sources[number], batch, view)
            references[batch] = writer.add(view[: len(batch) * PAGE_BYTES])
            progress.add(len(batch) * PAGE_BYTES)


def read_pages(source: Source, pages: npt.NDArray[np.int64], view: memoryview) -> None:
    """Reads these pages, in ascending order, one behind the other into `view`. Raises OSError."""
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = [0, *breaks.tolist(), len(pages)]
    for start, end in pairwise(starts):
        part = view[start * PAGE_BYTES : end * PAGE_BYTES]
        if os.preadv(source.fd, [part], source.base + int(pages[start]) * PAGE_BYTES) != len(part):
            raise OSError(errno.ESRCH, "a frozen process has ended")


def pack(job: Job, store: Store, tell: Callable[[dict[str, int]], None]) -> None:
    """All of it, telling how far it is: `done` and `total` in bytes, and at the end, when it is durable, `disk_bytes`
    and `devices_bytes`. Raises ForkyError, OSError."""
    references = np.frombuffer(mmap.mmap(job.references, job.memory_bytes // PAGE_BYTES * 8), np.uint64)
    order = job.order
    content = order.devices.read_bytes() if order.devices is not None else b""
    with contextlib.ExitStack() as opened:
        disk = opened.enter_context(contextlib.closing(DiskPacker(order.disk))) if order.disk is not None else None
        total = int(np.count_nonzero(is_frozen(references))) * PAGE_BYTES + (disk.bytes if disk else 0)
        progress = Progress(total, tell)
        progress.say()
        writer = opened.enter_context(store.writer())
        pack_memory(writer, references, job.sources, progress)
        manifest = Manifest(
            snapshot=job.snapshot,
            parent=SnapshotId(job.parent) if job.parent else None,
            created_us=order.created_us,
            shape=order.shape,
            needs=Needs(
                qemu_build=order.qemu_build,
                machine_type=order.machine_type,
                cpu_model=order.cpu_model,
                accelerator=order.accelerator,
                cpu=order.cpu,
                cpu_features=order.cpu_features,
            ),
            base=BaseImage(id=order.disk.base.id, sha256=order.disk.base.sha256) if order.disk else None,
            devices=make_device_state(writer, content),
            memory=make_section(writer, references, job.memory_bytes),
            disk=disk.pack(store, writer, progress.add) if disk else Section(0),
        )
        writer.commit()
        manifest_file.save(store, manifest)
    progress.say(disk_bytes=manifest.disk.size_bytes, devices_bytes=manifest.devices.length)
