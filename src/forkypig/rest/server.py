"""Runs the REST API until SIGTERM."""

import asyncio
import contextlib
import dataclasses
import gc
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from forkypig.certificates.tls import Tls
from forkypig.daemon.server import tell_systemd
from forkypig.daemon.settings import Settings
from forkypig.rest.app import make_app
from forkypig.rest.caller import CallerChannel
from forkypig.rest.listening import Address, bound, check_tokens_count, tls
from forkypig.rest.problems import OnlyProblems
from forkypig.sdk.client import Forky

log = structlog.get_logger()
# Of one WebSocket message: a command's input comes in pieces.
_MOST_MESSAGE_BYTES = 1 << 20
_GRACE_S = 2  # for requests that are under way at the end


class Server(uvicorn.Server):
    """Signals are for whoever runs it: uvicorn would raise them once more at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def made_server(app: ASGIApp, secure: Tls | None = None, proxies: str = "") -> Server:
    """A server for the application. `proxies`: settings.rest_proxies."""
    config = uvicorn.Config(
        OnlyProblems(app),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=[word.strip() for word in proxies.split(",")],
        ws_max_size=_MOST_MESSAGE_BYTES,
        timeout_graceful_shutdown=_GRACE_S,
    )
    if secure is not None:
        config.load()
        config.ssl = secure.context
    return Server(config)


@contextlib.contextmanager
def _said(settings: Settings, address: Address, scheme: str, listener: socket.socket) -> Iterator[None]:
    """A file with the address, as long as it serves: `forky up` waits for it, and port 0 becomes a number there."""
    mark = settings.run / "rest.address"
    port = listener.getsockname()[1] if address.is_tcp else 0
    mark.write_text(f"{scheme}{dataclasses.replace(address, port=port)}\n")
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


async def run(settings: Settings) -> None:
    """Serves until SIGTERM. Raises InvalidRequest and NotPossibleNow for what can't be listened on, HostUnreachable
    where no controller runs."""
    (settings.run / "rest.address").unlink(missing_ok=True)  # of one that was killed
    address = Address.of(settings)
    secure = tls(settings, address)
    scheme = "unix:" if not address.is_tcp else "http://" if secure is None else "https://"
    if address.is_tcp:
        await check_tokens_count(settings.socket("controller"))
    async with Forky(settings.home, start=False, token="", tenant="", wrap_channel=CallerChannel) as forky:  # type: ignore[arg-type]
        server = made_server(make_app(forky, token_needed=address.is_tcp), secure, settings.rest_proxies)
        loop = asyncio.get_running_loop()

        def end() -> None:
            server.should_exit = True

        with bound(address) as listener, _said(settings, address, scheme, listener):
            gc.freeze()  # as in daemon/server.py
            serving = asyncio.create_task(server.serve([listener]))
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, end)
            log.info("serving", address=str(address), tls=secure is not None)
            tell_systemd()
            await serving
        log.info("stopping")
