"""A socket, and the application served on it until a signal comes.

uvicorn has no limit on how long the head of a request may take to arrive, so a thousand connections that send
a byte a minute would occupy it (slowloris); a task here closes what is idle. Use:
`listener = listen("127.0.0.1", 0)`, then `Server(app, listener).run()`.
"""

import asyncio
import socket
import time
from collections.abc import Iterable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

#: A connection on which no request is being answered is closed after so many seconds.
IDLE_SECONDS = 15.0
#: Connections at once; more are told to come back.
MAX_CONNECTIONS = 1_000
#: After a signal, answers under way have so many seconds.
GRACE_SECONDS = 3


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket bound to `host` and `port` (0: a free one); raises OSError where that cannot be."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1_024)
    except BaseException:
        listener.close()
        raise
    return listener


class Server:
    """Serves an application on a socket.

    Args:
        app: the application.
        listener: bound and listening; closed at the end.
        idle_seconds: how long a connection may stay without a whole request.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, idle_seconds: float = IDLE_SECONDS) -> None:
        self.listener = listener
        self.idle_seconds = idle_seconds
        config = uvicorn.Config(
            app,
            http=H11Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=max(1, int(idle_seconds)),
            timeout_graceful_shutdown=GRACE_SECONDS,
            h11_max_incomplete_event_size=16_384,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serves until `stop`, SIGINT or SIGTERM, whose handlers are then called as before."""
        try:
            asyncio.run(self._run())
        finally:
            self.listener.close()

    def stop(self) -> None:
        """Lets `run` end, from another thread."""
        self._server.should_exit = True

    async def _run(self) -> None:
        watch = asyncio.create_task(self._close_idle())
        try:
            await self._server.serve([self.listener])
        finally:
            watch.cancel()

    async def _close_idle(self) -> None:
        """Closes connections on which nothing was asked for too long, or only the beginning of something."""
        since: dict[_Idle, float] = {}
        while True:
            await asyncio.sleep(min(1.0, self.idle_seconds / 4))
            now = time.monotonic()
            since = {each: since.get(each, now) for each in _idle(self._server.server_state.connections)}
            for (connection, _), then in since.items():
                if now - then > self.idle_seconds and connection.transport is not None:
                    connection.transport.close()


#: A connection, and the last question on it, so that one which was asked something meanwhile is another one.
_Idle = tuple[H11Protocol, RequestResponseCycle | None]


def _idle(connections: Iterable[object]) -> list[_Idle]:
    """Connections on which no question has come whole, or the last one is answered."""
    ours = [(each, each.cycle) for each in connections if isinstance(each, H11Protocol)]
    return [(each, cycle) for each, cycle in ours if cycle is None or cycle.response_complete]
