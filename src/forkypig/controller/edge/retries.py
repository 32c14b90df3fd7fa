"""Requests that come again: the same caller, method and `idempotency-key` get the same answer for a day, and what was
asked for is made once.

Three places know of a request. While it is under way here, its lock: the second waits for the first. When it is
answered, `answers`. In between, when the controller died or the caller left, its intent: one that is open is waited
for, one that is done is answered from the rows that it has made, one that was undone has made nothing, and the request
is carried out as if it were new. Errors are not kept, for the same reason: what fails is undone.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace

import structlog
from google.protobuf.message import Message

from forkypig.controller import retried
from forkypig.controller.auth import roles
from forkypig.controller.retried import Asked
from forkypig.controller.store import Store, answers, intents, machines, pools, snapshots
from forkypig.controller.store.answers import Answer
from forkypig.core.intents import Intent, IntentKind, IntentStatus
from forkypig.daemon.server import now_us
from forkypig.errors import HostUnreachable, InvalidRequest, NotFound, ResourceExhausted
from forkypig.model import Acquired, Child, ForkResult
from forkypig.model.access import Principal
from forkypig.v1 import common_pb2 as common
from forkypig.v1 import controller_pb2 as pb
from forkypig.wire import convert, keys
from forkypig.wire import pools as pool_wire

log = structlog.get_logger()

_LONGEST_KEY = 128
_POLL_S = 0.05
_KINDS = {
    "/forkypig.v1.Controller/RunMachine": IntentKind.RUN,
    "/forkypig.v1.Controller/Fork": IntentKind.FORK,
    "/forkypig.v1.Pools/Acquire": IntentKind.ACQUIRE,
    "/forkypig.v1.Controller/TakeSnapshot": IntentKind.SNAPSHOT,
    "/forkypig.v1.Controller/RemoveMachine": IntentKind.REMOVE_MACHINE,
    "/forkypig.v1.Controller/RemoveSnapshot": IntentKind.REMOVE_SNAPSHOT,
}


def applies_to(method: str, *, streamed: bool) -> bool:
    """Whether a key counts: for what changes something, and answers at once or at last."""
    if streamed:
        return method in keys.RESULT_AT_LAST
    return not roles.only_looks(method) and method not in keys.ONCE


def is_progress(message: Message) -> bool:
    """Whether a stream's message only tells that it goes on."""
    return "progress" in message.DESCRIPTOR.fields_by_name and message.HasField("progress")


def asked(who: Principal, method: str, key: str, request: Message, *, is_new: bool = False) -> Asked:
    """The request as it is told from others. Raises InvalidRequest for a key that is none."""
    if not 0 < len(key) <= _LONGEST_KEY or not key.isprintable():
        raise InvalidRequest(f"an idempotency key has 1 to {_LONGEST_KEY} printable characters: a UUID is a good one")
    caller = "\0".join((who.name, who.tenant, method, key))
    content = request.SerializeToString(deterministic=True)
    return Asked(
        hashlib.sha256(caller.encode()).hexdigest(), hashlib.sha256(content).hexdigest(), _KINDS.get(method), is_new
    )


class Retries:
    """Those of one controller."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._under_way: dict[str, tuple[asyncio.Lock, int]] = {}
        self._left: dict[str, Asked] = {}  # by callers who did not wait for what they had begun

    @contextlib.asynccontextmanager
    async def turn(self, asked: Asked) -> AsyncIterator[None]:
        """One at a time works on a request."""
        lock, waiting = self._under_way.get(asked.request, (asyncio.Lock(), 0))
        self._under_way[asked.request] = (lock, waiting + 1)
        try:
            async with lock:
                while (left := self._left.get(asked.request)) is not None and left.works:
                    await asyncio.wait(left.works)
                try:
                    yield
                finally:
                    if asked.works:
                        self._leave(asked)
        finally:
            lock, waiting = self._under_way.pop(asked.request)
            if waiting > 1:
                self._under_way[asked.request] = (lock, waiting - 1)

    def _leave(self, asked: Asked) -> None:
        self._left[asked.request] = asked
        for work in list(asked.works):
            work.add_done_callback(lambda _: self._forget(asked))

    def _forget(self, asked: Asked) -> None:
        if not asked.works and self._left.get(asked.request) is asked:
            del self._left[asked.request]

    async def answer(self, asked: Asked) -> bytes | None:
        """What was answered to it, serialised; waits while an operation of it is under way. None: nothing has come of
        it, and it is to be carried out, which begins with this task.

        Raises InvalidRequest for another request under the same key, NotFound when what it made has gone since."""
        if asked.is_new:
            retried.begin(asked)
            return None
        while True:
            async with self._store.glance() as tx:
                kept = await answers.get(tx, asked.request, now_us())
                begun = None if kept is not None else await intents.of_request(tx, asked.request)
            if (before := kept.content_sha256 if kept else begun[1] if begun else None) is not None:
                _check_same(before, asked)
            if kept is not None:
                return kept.answer
            if begun is None or begun[0].status is IntentStatus.UNDONE:
                retried.begin(asked)
                return None
            if begun[0].status is IntentStatus.DONE:
                return (await self._from_rows(begun[0])).SerializeToString()
            await asyncio.sleep(_POLL_S)

    async def keep(self, asked: Asked, answer: Message) -> None:
        """It has been answered. Never raises for a database that is full or away: what was asked for is done, and who
        is told that it failed would do it again."""
        if asked.is_kept:
            return
        row = Answer(asked.content_sha256, answer.SerializeToString())
        try:
            async with self._store.write() as tx:
                await answers.keep(tx, asked.request, row, now_us())
        except (ResourceExhausted, HostUnreachable) as error:
            log.warning("an answer is not kept for those who ask again", error=str(error))

    async def _from_rows(self, done: Intent) -> Message:
        """The answer, from what an operation has made. How long it took is not known any more."""
        async with self._store.read() as tx:
            made = [await machines.get(tx, machine) for machine in done.machines]
            held = await pools.leases_of(tx, done.machines)
            snapshot = await snapshots.get(tx, done.snapshot) if done.snapshot else None
            there = [
                replace(machine, expires_us=held[machine.id].expires_us if machine.id in held else 0)
                for machine in made
                if machine is not None
            ]
            if done.kind is IntentKind.FORK and there and snapshot is None and there[0].snapshot:
                snapshot = await snapshots.get(tx, there[0].snapshot)
        if done.kind in (IntentKind.REMOVE_MACHINE, IntentKind.REMOVE_SNAPSHOT):
            return common.Empty()
        if done.kind is IntentKind.SNAPSHOT and snapshot is not None:
            return convert.snapshot_to_wire(snapshot)
        if len(there) == len(made):
            if done.kind is IntentKind.RUN:
                result = pb.RunResult(machine=convert.machine_to_wire(there[0]))
                return pb.RunMachineResponse(result=result)
            if done.kind is IntentKind.ACQUIRE and (lease := held.get(done.machines[0])) is not None:
                return pool_wire.acquired_to_wire(Acquired(there[0], lease, 0.0, lease.acquired_us))
            if done.kind is IntentKind.FORK and snapshot is not None:
                children = tuple(Child(machine, 0.0) for machine in there)
                pause_ms = snapshot.pause_ms if done.source else 0.0
                return convert.fork_result_to_wire(
                    ForkResult(snapshot=snapshot, parent=done.source, pause_ms=pause_ms, children=children)
                )
        gone = next((m for m, row in zip(done.machines, made, strict=True) if row is None), done.snapshot or "")
        raise NotFound("machine or snapshot", gone, "this request had made it, and it was removed since")


def _check_same(before: str, asked: Asked) -> None:
    if before != asked.content_sha256:
        raise InvalidRequest("this idempotency key came with another request before: use a new key for a new request")
