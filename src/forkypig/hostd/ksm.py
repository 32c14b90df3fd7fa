"""Kernel samepage merging for the machines of tenants that want it: switched on and off, tuned, counted.

The kernel merges equal anonymous pages of whatever asked for it (MADV_MERGEABLE), with no notion of tenants: so only
machines of tenants that are on ask. A child's memory is a private mapping of its snapshot's file, of which only what
was written is anonymous; what is shared with the parent anyway is not KSM's business. Machines that booted have shared
memory, which KSM leaves alone, until their first fork.

(Documentation/admin-guide/mm/ksm.rst; a merged page tells by the time that a write takes that somebody else has the
same content, CVE-2015-2877.)
"""

import asyncio
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from forkypig.errors import ForkyError, NotPossibleNow
from forkypig.model.ksm import KsmStatus

if TYPE_CHECKING:
    from forkypig.hostd.machine import LiveMachine

log = structlog.get_logger()

_SYS = Path("/sys/kernel/mm/ksm")
# 80 MB/s at most: a GiB of written memory is gone over in 13 s, a choice that was not tuned. The kernel's own 100 pages
# each 20 ms would take a minute.
_TUNED = {"pages_to_scan": "1000", "sleep_millisecs": "50"}
_PAGE_BYTES = 4096


class Ksm:
    """The kernel's switch, and who is on."""

    def __init__(self, state: Path, sys: Path = _SYS) -> None:
        """`state`: a file that remembers who is on and how the kernel was set before."""
        self._state, self._sys = state, sys
        self._turn = asyncio.Lock()
        self._tenants: frozenset[str] = frozenset()
        self._before: dict[str, str] = {}  # as the kernel was set; empty: it is as it was
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            kept = json.loads(state.read_text())
            self._tenants, self._before = frozenset(kept["tenants"]), dict(kept["before"])

    def is_on(self, tenant: str) -> bool:
        return tenant in self._tenants

    async def set(self, tenants: Iterable[str], machines: Iterable["LiveMachine"]) -> None:
        """KSM is for these tenants' machines, and no others. Raises NotPossibleNow without it or without root."""
        async with self._turn:
            self._tenants = await asyncio.to_thread(self._switch, frozenset(tenants))
            for live in list(machines):
                await self.apply(live)

    async def apply(self, live: "LiveMachine") -> None:
        """Has a machine's memory merged, or taken apart again, as it is to be. One that ends meanwhile is fine."""
        if live.process is None:
            return
        try:
            arguments = {"path": "/objects/ram0", "property": "merge", "value": self.is_on(live.tenant)}
            await live.process.session.execute("qom-set", arguments)
        except ForkyError as error:
            log.warning("a machine's memory is not merged as it ought to be", machine=live.id, error=str(error))

    def begin(self) -> None:
        """When hostd starts: the kernel is set as it is to be. Blocks for a moment; raises NotPossibleNow."""
        self._switch(self._tenants)

    def put_back(self) -> None:
        """When nothing runs any more: the kernel is set as it was; `begin` sets it again. Blocks for a moment."""
        try:
            self._restore()
            self._remember()
        except OSError as error:
            log.error("KSM is not set back", error=str(error))

    def _switch(self, tenants: frozenset[str]) -> frozenset[str]:
        """The kernel's part."""
        try:
            if tenants and not self._before:
                self._tune()
            elif not tenants:
                self._restore()
            self._tenants = tenants
            self._remember()
        except OSError as error:
            raise NotPossibleNow(
                f"KSM can't be set here ({error.filename}: {error.strerror}): it takes root and a kernel that has it"
            ) from error
        return tenants

    def _tune(self) -> None:
        """One that somebody else has running keeps their settings."""
        self._before = {name: (self._sys / name).read_text().strip() for name in ("run", *_TUNED)}
        self._remember()  # before anything is changed
        if self._before["run"] != "1":
            for name, value in (_TUNED | {"run": "1"}).items():
                (self._sys / name).write_text(value)

    def _restore(self) -> None:
        if self._before.get("run") == "0":
            # Takes merged pages apart. A ksmd that is only stopped does not count what MADV_UNMERGEABLE took apart.
            (self._sys / "run").write_text("2")
        for name, value in self._before.items():
            (self._sys / name).write_text(value)
        self._before = {}

    def _remember(self) -> None:
        if not self._tenants and not self._before:
            self._state.unlink(missing_ok=True)
            return
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps({"tenants": sorted(self._tenants), "before": self._before}))
        new.replace(self._state)

    def saving(self, pids: Iterable[int], proc: Path = Path("/proc")) -> KsmStatus:
        """What it saves now; zeros where the kernel has no KSM. For a worker thread."""
        merged = sum(_number(proc / str(pid) / "ksm_merging_pages") for pid in pids)
        return KsmStatus(
            running=_number(self._sys / "run") == 1,
            tenants=tuple(sorted(self._tenants)),
            merged_bytes=merged * _PAGE_BYTES,
            profit_bytes=_number(self._sys / "general_profit"),
            full_scans=_number(self._sys / "full_scans"),
        )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # older kernels have fewer of these; processes end
        return 0
