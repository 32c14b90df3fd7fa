"""The edge of the controller's services: who asks, and in which tenant, before a method runs."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from forkypig.controller.principal import begin_acting, in_tenant, principal
from forkypig.controller.store import Store, tenants
from forkypig.errors import ForkyError, NotFound
from forkypig.wire.status import abort

TENANT_KEY = "forky-tenant"  # metadata: the tenant that the operator acts in


class Calls(grpc.aio.ServerInterceptor):
    """Every call runs as a Principal."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Runs in the call's own task: what is set here holds for the method."""
        named = [value for key, value in handler_call_details.invocation_metadata or () if key == TENANT_KEY]
        if named:
            try:
                who = in_tenant(principal(), str(named[-1]))
                async with self._store.read() as tx:
                    if await tenants.get(tx, who.tenant) is None:
                        raise NotFound("tenant", who.tenant, "see forky tenant ls")
            except ForkyError as error:
                return _refused(error)
            begin_acting(who)
        return await continuation(handler_call_details)


def _refused(error: ForkyError) -> Any:
    """A method that does nothing but fail; it streams, which is also what a call that does not looks like."""

    async def refuse(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        await abort(context, error)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)
