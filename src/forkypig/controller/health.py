"""GetStatus and Doctor: the controller's own checks together with the host's."""

import asyncio
import shutil

from forkypig.controller.desk import Desk
from forkypig.controller.principal import principal
from forkypig.controller.store import machines, snapshots
from forkypig.daemon.server import daemon_message
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb

_OK, _WARNING, _FAILED = common.Check.VERDICT_OK, common.Check.VERDICT_WARNING, common.Check.VERDICT_FAILED
# The default image takes 200 MiB and its build twice that; below a GiB the first fork under load may fail.
_LITTLE_MIB, _TOO_LITTLE_MIB = 4096, 1024
# `forky status` is there to say that something hangs: it must not hang itself.
_STATUS_S = 5.0


class Health:
    """How this instance is."""

    def __init__(self, desk: Desk, settings: Settings, started_us: int) -> None:
        self._desk, self._settings, self._started_us = desk, settings, started_us

    async def status(self) -> pb.GetStatusResponse:
        """Answers also when hostd does not."""
        answer = pb.GetStatusResponse(controller=daemon_message(self._started_us), home=str(self._settings.home))
        whose = principal().tenant
        async with self._desk.store.read() as tx:
            answer.machines, answer.snapshots = await machines.count(tx, whose), await snapshots.count(tx, whose)
        try:
            host = await self._desk.host.status(timeout_s=_STATUS_S)
        except ForkyError as error:
            answer.hostd_error = str(error)
            answer.pager_error = "not known while hostd can't be reached"
            return answer
        answer.hostd.CopyFrom(host.hostd)
        if host.HasField("pager"):
            answer.pager.CopyFrom(host.pager)
        answer.pager_error = host.pager_error
        answer.accelerator, answer.accelerator_reason = host.accelerator, host.accelerator_reason
        answer.qemu_version = host.qemu_version
        answer.network, answer.network_reason = host.network, host.network_reason
        if host.HasField("tiers"):
            answer.tiers.CopyFrom(host.tiers)
        return answer

    async def doctor(self) -> pb.DoctorResponse:
        """Every requirement, whether it holds and how to mend it."""
        checks = [await self._database(), await asyncio.to_thread(self._space)]
        try:
            checks += await self._desk.host.doctor()
        except ForkyError as error:
            checks.append(
                common.Check(
                    name="hostd",
                    verdict=_FAILED,
                    detail=str(error),
                    remedy=f"run `forky up`; if it does not stay up, see {self._settings.logs / 'hostd.log'}",
                )
            )
        return pb.DoctorResponse(checks=checks)

    async def _database(self) -> common.Check:
        path = self._desk.store.where
        try:
            trouble = await self._desk.store.check()
        except ForkyError as error:
            trouble = str(error)
        if trouble:
            remedy = f"put a backup of {path} in its place, or move it away: machines are then found again on the host"
            if self._desk.store.is_shared:
                remedy = "see the log of the PostgreSQL server"
            return common.Check(name="database", verdict=_FAILED, detail=trouble, remedy=remedy)
        sound = "answers" if self._desk.store.is_shared else "is sound"
        return common.Check(name="database", verdict=_OK, detail=f"{path} {sound}")

    def _space(self) -> common.Check:
        home = self._settings.home
        free_mib = shutil.disk_usage(home).free >> 20
        detail = f"{free_mib} MiB free at {home}"
        if free_mib >= _LITTLE_MIB:
            return common.Check(name="disk space", verdict=_OK, detail=detail)
        return common.Check(
            name="disk space",
            verdict=_WARNING if free_mib >= _TOO_LITTLE_MIB else _FAILED,
            detail=detail,
            remedy=f"free some there ({_LITTLE_MIB} MiB are comfortable), or put FORKY_HOME on another disk",
        )
