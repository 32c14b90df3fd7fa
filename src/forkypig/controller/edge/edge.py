"""Every call on its way in and out: who it is from, whether they may, not too often, whether it came before; and its
line in the audit log.

In this order: what nobody may do costs the least, and nothing is looked up for somebody who is not let in.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from forkypig.controller.audit import AuditLog, entry_of
from forkypig.controller.auth import roles
from forkypig.controller.auth.gate import Gate
from forkypig.controller.edge import retries, subjects
from forkypig.controller.edge.retries import Retries
from forkypig.controller.principal import begin_acting
from forkypig.controller.retried import Asked
from forkypig.core.rate import Rates
from forkypig.daemon.settings import Settings
from forkypig.errors import ForkyError, NotFound, TooManyRequests, Unauthenticated
from forkypig.model.access import AuditEntry, Principal
from forkypig.wire.edge import read
from forkypig.wire.keys import KEY, NEW
from forkypig.wire.status import abort

Context = grpc.aio.ServicerContext[Any, Any]
_AS_BEFORE = "as answered before"
# A terminal may be open for days: after so long what was revoked no longer keeps it open.
LOOKED_UP_AGAIN_S = 10.0


class _Call:
    """One call, and what its line in the audit log will say."""

    def __init__(self, method: str, context: Context) -> None:
        self.method, self.context = method, context
        self.who: Principal | None = None
        self.about, self.made, self.result = "", "", "OK"
        self.has_answered = False  # a stream, with what the caller waited for
        self.begun = 0  # its number in the audit log, where its beginning was noted
        self.peer = unquote(context.peer())
        self._began_s = time.monotonic()

    def metadata(self) -> dict[str, str]:
        pairs = self.context.invocation_metadata() or ()
        return {key: value for key, value in pairs if isinstance(value, str)}

    def certificate(self) -> bytes | None:
        """The caller's, where TLS asked for one."""
        return next(iter(self.context.auth_context().get("x509_pem_cert", ())), None)

    def ended_by(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.result = "OK" if self.has_answered else "CANCELLED"
        else:
            code: Any = self.context.code()
            numbers = {status.value[0]: status.name for status in grpc.StatusCode}
            self.result = code.name if isinstance(code, grpc.StatusCode) else numbers.get(code, "UNKNOWN")
            if self.result == "OK":
                self.result = "UNKNOWN"

    def entry(self) -> AuditEntry:
        about = f"{self.about} -> {self.made}".strip() if self.made else self.about
        return entry_of(self.who, self.method, self.result, about=about, began_s=self._began_s, peer=self.peer)


@dataclass(frozen=True, slots=True)
class _Method:
    """One of a service: "/package.Service/Method"."""

    name: str
    reader: Callable[[bytes], Any]
    is_streamed: bool  # its requests

    def read(self, raw: bytes) -> Any:
        """A request. Raises InvalidRequest."""
        return read(self.name, self.reader, raw)


class Edge(grpc.aio.ServerInterceptor):
    """For all services of the controller."""

    def __init__(self, settings: Settings, gate: Gate, audit: AuditLog, retries: Retries) -> None:
        self._gate, self._audit, self._retries = gate, audit, retries
        self._rates = Rates(settings.rate_per_s, settings.rate_burst)
        self._audit_reads, self._audit_commands = settings.audit_reads, settings.audit_commands

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or roles.is_open(method):
            return handler
        forms: dict[tuple[bool, bool], tuple[Any, Any, Any]] = {
            (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler, self._answering),
            (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler, self._streaming),
            (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler, self._answering),
            (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler, self._streaming),
        }
        inner, rebuilt, around = forms[handler.request_streaming, handler.response_streaming]
        return rebuilt(
            around(_Method(method, handler.request_deserializer, handler.request_streaming), inner),
            # Read by us: what is no message is the caller's mistake (gRPC would call it a defect of ours), and only
            # of who may call is anything read.
            request_deserializer=None,
            response_serializer=lambda answer: (
                answer if isinstance(answer, bytes) else handler.response_serializer(answer)
            ),
        )

    def _answering(self, method: "_Method", inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answering(request: Any, context: Context) -> Any:
            call = _Call(method.name, context)
            try:
                request, asked = await self._admitted(call, method, request, streamed=False)
                if asked is None:
                    answer = await inner(request, context)
                else:
                    async with self._retries.turn(asked):
                        kept = await self._retries.answer(asked)
                        if kept is not None:
                            call.made = _AS_BEFORE
                            return kept  # serialised as it was
                        answer = await inner(request, context)
                        await self._retries.keep(asked, answer)
                call.made = _made(call, answer)
            except BaseException as error:
                await self._ended_badly(call, error)
                raise
            finally:
                self._note(call)
            return answer

        return answering

    def _streaming(
        self, method: "_Method", inner: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def streaming(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            call = _Call(method.name, context)
            try:
                request, asked = await self._admitted(call, method, request, streamed=True)
                async with (
                    self._while_let_in(call),
                    aclosing(self._messages(call, asked, lambda: inner(request, context))) as messages,
                ):
                    async for message in messages:
                        call.has_answered = isinstance(message, bytes) or subjects.is_last(message)
                        yield message
            except BaseException as error:
                await self._ended_badly(call, error)
                raise
            finally:
                self._note(call)

        return streaming

    async def _messages(
        self, call: _Call, asked: Asked | None, begin: Callable[[], AsyncIterator[Any]]
    ) -> AsyncGenerator[Any, None]:
        """A stream's messages; of one that came before the last, which is its result."""
        if asked is None:
            async with aclosing(cast(AsyncGenerator[Any, None], begin())) as messages:
                async for message in messages:
                    call.made = call.made or _made(call, message)
                    yield message
            return
        async with self._retries.turn(asked):
            kept = await self._retries.answer(asked)
            if kept is not None:
                call.made = _AS_BEFORE
                yield kept
                return
            async with aclosing(cast(AsyncGenerator[Any, None], begin())) as messages:
                async for message in messages:
                    if not retries.is_progress(message):
                        # Before it is handed out: a caller that does not get it asks again.
                        await self._retries.keep(asked, message)
                        call.made = _made(call, message)
                    yield message

    async def _admitted(self, call: _Call, method: "_Method", raw: Any, *, streamed: bool) -> tuple[Any, Asked | None]:
        """The request, or the stream of them, with what it is about noted. Raises ForkyError for who may not."""
        metadata = call.metadata()
        peer, call.peer = call.peer, self._gate.peer_of(call.peer, metadata)
        who = await self._gate.who(metadata, peer, call.certificate())
        call.who = who
        asked = None
        if method.is_streamed:
            request = self._noticed(call, method, raw)
        else:
            request = method.read(raw)
            call.about = subjects.about(request, commands=self._audit_commands)
            if (key := metadata.get(KEY)) is not None and retries.applies_to(call.method, streamed=streamed):
                asked = retries.asked(who, call.method, key, request, is_new=metadata.get(NEW) == key)
        roles.check_may(who, call.method)
        if not who.operator and (wait_s := self._rates.take(f"{who.tenant}\0{who.name}", time.monotonic())):
            raise TooManyRequests(wait_s)
        if not method.is_streamed:
            self._begin(call)
        begin_acting(who)
        return request, asked

    @asynccontextmanager
    async def _while_let_in(self, call: _Call) -> AsyncIterator[None]:
        """Ends the block with Unauthenticated when the caller's token or certificate no longer counts."""
        metadata, certificate = call.metadata(), call.certificate()
        if certificate is None and "authorization" not in metadata:
            yield  # by a Unix socket: whom the kernel names stays who they are
            return

        async def look(until: asyncio.Timeout) -> None:
            while True:
                await asyncio.sleep(LOOKED_UP_AGAIN_S)
                try:
                    await self._gate.who(metadata, call.context.peer(), certificate)
                except (Unauthenticated, NotFound):
                    until.reschedule(0.0)
                    return
                except ForkyError:  # the database is away: what is under way goes on
                    continue

        try:
            async with asyncio.timeout(None) as until:
                looking = asyncio.create_task(look(until), name="let-in")
                try:
                    yield
                finally:
                    looking.cancel()
        except TimeoutError as error:
            if not until.expired():
                raise
            raise Unauthenticated from error

    async def _noticed(self, call: _Call, method: "_Method", requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in requests:
            request = method.read(raw)
            if not call.about:
                call.about = subjects.about(request, commands=self._audit_commands)
            if not call.begun:
                self._begin(call)
            yield request

    def _begin(self, call: _Call) -> None:
        """Notes that something is about to change. Raises ResourceExhausted where that can't be written."""
        if not roles.only_looks(call.method):
            call.begun = self._audit.begin(call.method, call.entry())

    async def _ended_badly(self, call: _Call, error: BaseException) -> None:
        """Tells the caller of what we refused ourselves; what a service raised it has told."""
        try:
            if isinstance(error, ForkyError):
                await abort(call.context, error)
        finally:
            call.ended_by(error)

    def _note(self, call: _Call) -> None:
        if call.result != "OK" or self._audit_reads or not roles.only_looks(call.method):
            self._audit.write(call.entry(), call.begun)


def _made(call: _Call, answer: Any) -> str:
    return subjects.made(answer) if isinstance(answer, Message) and not roles.only_looks(call.method) else ""
