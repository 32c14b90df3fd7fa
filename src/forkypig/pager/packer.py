"""`python -m forkypig.pager.packer`: makes one snapshot durable, at the lowest priority, and ends. See packing.py.

stdin: a Job as JSON. It inherits descriptors of frozen processes, and a memfd with the reference of each page of
memory, in which it replaces those to frozen pages. It says how far it is, a line of JSON each:

    {"done": bytes, "total": bytes}          the last one also has disk_bytes and devices_bytes: it is durable
    {"full": text}                           the disk is full
    {"error": text}                          anything else
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from forkypig.chunks import manifest_file
from forkypig.chunks.format import PAGE_BYTES, References, is_frozen, layers_of
from forkypig.chunks.manifest import BaseImage, Manifest, Needs, make_device_state
from forkypig.chunks.section import Section, make_section
from forkypig.chunks.store import Store, open_store
from forkypig.chunks.writer import Writer
from forkypig.errors import ForkyError, ResourceExhausted
from forkypig.model import SnapshotId
from forkypig.pager.disk_packer import DiskPacker
from forkypig.pager.order import PackOrder

BATCH_PAGES = 1024
_SAY_EVERY_BYTES = 16 << 20
_PR_SET_PDEATHSIG = 1
_IOV_MAX = 1024


class Source(NamedTuple):
    """A descriptor to read a frozen memory from, and where in it guest memory begins."""

    fd: int
    base: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What there is to do. `references` and the sources are descriptors that are inherited."""

    store: Path
    snapshot: SnapshotId
    parent: str
    memory_bytes: int
    references: int
    sources: Mapping[int, Source]  # by number of the frozen layer
    order: PackOrder

    def encode(self) -> bytes:
        return _JOB.dump_json(self)


_JOB = TypeAdapter(Job)


class Progress:
    """Tells the holder."""

    def __init__(self, total_bytes: int) -> None:
        self.done_bytes, self.total_bytes = 0, total_bytes
        self._said = 0

    def add(self, count: int) -> None:
        self.done_bytes += count
        if self.done_bytes - self._said >= _SAY_EVERY_BYTES:
            self._said = self.done_bytes
            self.say()

    def say(self, **more: int) -> None:
        print(json.dumps({"done": self.done_bytes, "total": self.total_bytes, **more}), flush=True)


def step_back() -> None:
    """Runs when nobody else wants to, and never longer than the holder."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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


def pack(job: Job, store: Store) -> None:
    """All of it. Raises ForkyError, OSError."""
    order = job.order
    references = np.frombuffer(mmap.mmap(job.references, job.memory_bytes // PAGE_BYTES * 8), np.uint64)
    disk = DiskPacker(order.disk) if order.disk is not None else None
    content = order.devices.read_bytes() if order.devices is not None else b""
    total = int(np.count_nonzero(is_frozen(references))) * PAGE_BYTES + (disk.bytes if disk else 0)
    progress = Progress(total)
    progress.say()
    with store.writer() as writer:
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


def main() -> int:
    step_back()
    job = _JOB.validate_json(sys.stdin.buffer.read())
    try:
        pack(job, open_store(job.store))
    except ResourceExhausted as error:
        print(json.dumps({"full": str(error)}), flush=True)
    except (ForkyError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
