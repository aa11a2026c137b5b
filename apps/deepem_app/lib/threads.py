"""Requests answered in threads, so that a long one does not hold up all the others.

MONAI Label's endpoints are ``async def`` around blocking code: while one of them detects, downloads
or saves, its event loop answers nobody. Several server processes are no way out, since each of them
would know only of the trainings that it started itself. Here every request runs in a thread with
an event loop of its own. That is done at the border that ASGI defines, where nothing of MONAI Label
or FastAPI has to be known: whatever an endpoint answers or raises arrives as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from anyio import CapacityLimiter, to_thread

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Coroutine[Any, Any, None]]

DETECTING = ("/infer/",)
TASKS = ("/train/", "/scoring/", "/batch/")


class InThreads:
    """ASGI application that runs each request to another one in a thread of its own.

    Requests below `DETECTING` go one at a time and wait without a thread: a detection uses all
    cores, and any number of them may wait without taking the threads from the others. Requests
    below `TASKS` stay in the server's event loop, which is what keeps MONAI Label's tables of tasks
    right, and they only start and stop processes.
    """

    def __init__(self, app: App, prefix: str = ""):
        self._app = app
        self._prefix = prefix
        self._one_detection = CapacityLimiter(1)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what is none."""
        path = scope.get("path", "").removeprefix(self._prefix)
        if scope["type"] != "http" or path.startswith(TASKS):
            await self._app(scope, receive, send)
            return
        server = asyncio.get_running_loop()

        def of_server(coroutine: Any) -> Awaitable[Any]:
            return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, server))

        def answer() -> None:
            asyncio.run(
                self._app(scope, lambda: of_server(receive()), lambda sent: of_server(send(sent)))
            )

        limiter = self._one_detection if path.startswith(DETECTING) else None
        await to_thread.run_sync(answer, limiter=limiter)
