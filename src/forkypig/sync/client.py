"""The blocking client. More than 300 lines, but a list: a short method for each verb, for editors and mypy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from forkypig import model
from forkypig.model.access import EVERY_TENANT, AuditEntry, Principal, Role
from forkypig.model.ksm import KsmStatus
from forkypig.model.tenants import Quota
from forkypig.sdk import client
from forkypig.sdk.access import Token
from forkypig.sdk.bisect import Bisected, OnTrial
from forkypig.sdk.client import OnProgress
from forkypig.sdk.diff import Diff
from forkypig.sdk.machine import UNCHANGED
from forkypig.sdk.observe import Usage
from forkypig.sdk.status import Check, Status
from forkypig.sdk.store import CheckedStore, Collected, Exported, RemoteSnapshot, Transferred
from forkypig.sdk.tenants import TenantInfo
from forkypig.sync.loop import Loop
from forkypig.sync.machine import Fork, Machine, fork_of
from forkypig.sync.pools import Pool

_NO_CHANGE = Quota()


class Forky:
    """A connection to one instance of Forky Pig; see forkypig.sdk.Forky. Use as a context manager."""

    def __init__(
        self,
        home: str | Path | None = None,
        *,
        start: bool = True,
        on_progress: OnProgress | None = None,
        controller: str | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        tenant: str | None = None,
    ) -> None:
        self._inner = client.Forky(
            home,
            start=start,
            on_progress=on_progress,
            controller=controller,
            token=token,
            ca=ca,
            certificate=certificate,
            key=key,
            tenant=tenant,
        )
        self._loop: Loop | None = None

    def connect(self) -> Self:
        loop = self._loop or Loop()
        try:
            loop.run(self._inner.connect())
        except BaseException:
            if self._loop is None:
                loop.close()
            raise
        self._loop = loop
        return self

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.run(self._inner.close())
            loop.close()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> Loop:
        # Asking for the channel raises what it has to when there is none.
        if self._loop is None:
            _ = self._inner.channel
        assert self._loop is not None
        return self._loop

    def run(
        self,
        image: str = "",
        *,
        name: str = "",
        cpus: int = 0,
        memory_mib: int = 0,
        disk_mib: int = 0,
        cold_boot: bool = False,
        snapshot: str = "",
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
        on_progress: OnProgress | None = None,
    ) -> Machine:
        loop = self._open
        made = self._inner.run(
            image,
            name=name,
            cpus=cpus,
            memory_mib=memory_mib,
            disk_mib=disk_mib,
            cold_boot=cold_boot,
            snapshot=snapshot,
            config=config,
            ttl_s=ttl_s,
            on_progress=on_progress,
        )
        return Machine(loop, loop.run(made))

    def fork(
        self,
        source: str,
        count: int = 1,
        *,
        name: str = "",
        paused: bool = False,
        quiesce: bool = False,
        forget: Sequence[str] = (),
        config: model.ConfigChange = UNCHANGED,
        ttl_s: float = 0.0,
    ) -> Fork:
        loop = self._open
        making = self._inner.fork(
            source, count, name=name, paused=paused, quiesce=quiesce, forget=forget, config=config, ttl_s=ttl_s
        )
        return fork_of(loop, loop.run(making))

    def get(self, machine: str) -> Machine:
        loop = self._open
        return Machine(loop, loop.run(self._inner.get(machine)))

    def list(self) -> Sequence[Machine]:
        loop = self._open
        return [Machine(loop, found) for found in loop.run(self._inner.list())]

    def snapshots(self) -> Sequence[model.Snapshot]:
        return self._open.run(self._inner.snapshots())

    def get_snapshot(self, snapshot: str) -> model.Snapshot:
        return self._open.run(self._inner.get_snapshot(snapshot))

    def history(self, source: str) -> Sequence[model.Snapshot]:
        return self._open.run(self._inner.history(source))

    def tag(self, snapshot: str, tag: str, *, force: bool = False) -> model.Snapshot:
        return self._open.run(self._inner.tag(snapshot, tag, force=force))

    def untag(self, tag: str) -> model.Snapshot:
        return self._open.run(self._inner.untag(tag))

    def pack(self, snapshot: str, *, on_progress: OnProgress | None = None) -> model.Snapshot:
        return self._open.run(self._inner.pack(snapshot, on_progress=on_progress))

    def diff(self, before: str, after: str, *, patch: bool = False, on_progress: OnProgress | None = None) -> Diff:
        return self._open.run(self._inner.diff(before, after, patch=patch, on_progress=on_progress))

    def bisect(
        self,
        source: str,
        argv: Sequence[str],
        *,
        good: str,
        bad: str = "",
        timeout_s: float = 0.0,
        on_trial: OnTrial | None = None,
    ) -> Bisected:
        return self._open.run(
            self._inner.bisect(source, argv, good=good, bad=bad, timeout_s=timeout_s, on_trial=on_trial)
        )

    def pool(self, name: str) -> Pool:
        return Pool(self._open, self._inner.pool(name))

    def create_pool(
        self,
        name: str,
        source: str,
        *,
        target: int,
        max: int,
        cpus: int = 0,
        memory_mib: int = 0,
        disk_mib: int = 0,
    ) -> model.PoolStatus:
        return self._open.run(
            self._inner.create_pool(
                name, source, target=target, max=max, cpus=cpus, memory_mib=memory_mib, disk_mib=disk_mib
            )
        )

    def pools(self, *, contents: bool = False) -> Sequence[model.PoolStatus]:
        return self._open.run(self._inner.pools(contents=contents))

    def release(self, machine: str, *, recycle: bool = False) -> None:
        self._open.run(self._inner.release(machine, recycle=recycle))

    def renew(self, machine: str, ttl_s: float = 0.0) -> model.Lease:
        return self._open.run(self._inner.renew(machine, ttl_s))

    def remove_snapshot(self, snapshot: str) -> None:
        self._open.run(self._inner.remove_snapshot(snapshot))

    def export_snapshot(
        self,
        snapshot: str,
        target: str | Path | IO[bytes],
        *,
        with_image: bool = True,
        sign: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Exported:
        return self._open.run(
            self._inner.export_snapshot(snapshot, target, with_image=with_image, sign=sign, on_progress=on_progress)
        )

    def import_snapshot(
        self,
        source: str | Path | IO[bytes],
        *,
        tag: str = "",
        trust: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        return self._open.run(self._inner.import_snapshot(source, tag=tag, trust=trust, on_progress=on_progress))

    def push_snapshot(
        self,
        snapshot: str,
        url: str,
        *,
        environment: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        return self._open.run(
            self._inner.push_snapshot(snapshot, url, environment=environment, on_progress=on_progress)
        )

    def pull_snapshot(
        self,
        url: str,
        name: str,
        *,
        tag: str = "",
        environment: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Transferred:
        return self._open.run(
            self._inner.pull_snapshot(url, name, tag=tag, environment=environment, on_progress=on_progress)
        )

    def remote_snapshots(self, url: str, *, environment: Mapping[str, str] | None = None) -> Sequence[RemoteSnapshot]:
        return self._open.run(self._inner.remote_snapshots(url, environment=environment))

    def collect(self, *, dry_run: bool = False, on_progress: OnProgress | None = None) -> Collected:
        return self._open.run(self._inner.collect(dry_run=dry_run, on_progress=on_progress))

    def check_store(self, *, deep: bool = False, on_progress: OnProgress | None = None) -> CheckedStore:
        return self._open.run(self._inner.check_store(deep=deep, on_progress=on_progress))

    def tenants(self) -> Sequence[TenantInfo]:
        return self._open.run(self._inner.tenants())

    def get_tenant(self, name: str = "") -> TenantInfo:
        return self._open.run(self._inner.get_tenant(name))

    def create_tenant(self, name: str, *, quota: Quota = _NO_CHANGE) -> TenantInfo:
        return self._open.run(self._inner.create_tenant(name, quota=quota))

    def set_quota(self, name: str, quota: Quota = _NO_CHANGE, *, unlimited: Sequence[str] = ()) -> TenantInfo:
        return self._open.run(self._inner.set_quota(name, quota, unlimited=unlimited))

    def remove_tenant(self, name: str) -> None:
        self._open.run(self._inner.remove_tenant(name))

    def ksm(self) -> KsmStatus:
        return self._open.run(self._inner.ksm())

    def set_ksm(self, *, on: bool, across_tenants: bool = False) -> KsmStatus:
        return self._open.run(self._inner.set_ksm(on=on, across_tenants=across_tenants))

    def share(self, snapshot: str, tenant: str = EVERY_TENANT) -> model.Snapshot:
        return self._open.run(self._inner.share(snapshot, tenant))

    def unshare(self, snapshot: str, tenant: str = EVERY_TENANT) -> model.Snapshot:
        return self._open.run(self._inner.unshare(snapshot, tenant))

    def images(self) -> Sequence[model.Image]:
        return self._open.run(self._inner.images())

    def get_image(self, image: str) -> model.Image:
        return self._open.run(self._inner.get_image(image))

    def build_image(
        self, name: str = "", *, rebuild: bool = False, on_progress: OnProgress | None = None
    ) -> model.Image:
        return self._open.run(self._inner.build_image(name, rebuild=rebuild, on_progress=on_progress))

    def update_image(self, image: str, *, forget_files: Sequence[str]) -> model.Image:
        return self._open.run(self._inner.update_image(image, forget_files=forget_files))

    def remove_image(self, image: str) -> None:
        self._open.run(self._inner.remove_image(image))

    def whoami(self) -> Principal:
        return self._open.run(self._inner.whoami())

    def create_token(self, role: Role, *, tenant: str = "", lifetime_s: int = 0, name: str = "") -> tuple[Token, str]:
        return self._open.run(self._inner.create_token(role, tenant=tenant, lifetime_s=lifetime_s, name=name))

    def tokens(self) -> Sequence[Token]:
        return self._open.run(self._inner.tokens())

    def revoke_token(self, token: str) -> Token:
        return self._open.run(self._inner.revoke_token(token))

    def audit(self, *, since_us: int = 0, follow: bool = False) -> Iterator[AuditEntry]:
        return self._open.iterate(self._inner.audit(since_us=since_us, follow=follow))

    def status(self) -> Status:
        return self._open.run(self._inner.status())

    def remote_status(self) -> Status:
        return self._open.run(self._inner.remote_status())

    def doctor(self) -> Sequence[Check]:
        return self._open.run(self._inner.doctor())

    def follow_events(
        self,
        *,
        after_sequence: int = 0,
        since_us: int = 0,
        kinds: Sequence[str] = (),
        follow: bool = True,
        patience_s: float = 60.0,
    ) -> Iterator[model.Event]:
        stream = self._inner.follow_events(
            after_sequence=after_sequence, since_us=since_us, kinds=kinds, follow=follow, patience_s=patience_s
        )
        return self._open.iterate(stream)

    def usage(self) -> Usage:
        return self._open.run(self._inner.usage())

    def metrics(self) -> str:
        return self._open.run(self._inner.metrics())

    def events(self, *, after_sequence: int = 0, limit: int = 0) -> Iterator[model.Event]:
        return self._open.iterate(self._inner.events(after_sequence=after_sequence, limit=limit))
