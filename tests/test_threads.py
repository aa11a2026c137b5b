"""Requests in threads: one that blocks holds up only those that have to wait for it."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

APP = Path(__file__).parent.parent / "apps" / "deepem_app"


@pytest.fixture
def in_threads(monkeypatch):
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(APP)
    return importlib.import_module("lib.threads").InThreads


class Server:
    """Endpoints like MONAI Label's: ``async def`` around code that blocks."""

    def __init__(self):
        self.go_on = threading.Event()
        self.detecting = 0
        self.most_at_once = 0
        self.threads: dict[str, int] = {}
        self.app = Starlette(
            routes=[
                Route("/infer/{model}", self.infer, methods=["POST"]),
                Route("/refused/", self.refused),
                Route("/broken/", self.broken),
                Route("/file/", self.file),
                Route("/{rest:path}", self.other, methods=["GET", "POST"]),
            ]
        )

    async def infer(self, request):
        self.detecting += 1
        self.most_at_once = max(self.most_at_once, self.detecting)
        sent = await request.body()
        in_time = self.go_on.wait(20)
        self.go_on.set()  # or all others would wait as long
        assert in_time
        self.detecting -= 1
        return JSONResponse({"bytes": len(sent)})

    async def other(self, request):
        self.threads[request.url.path] = threading.get_ident()
        return JSONResponse({"sent": (await request.body()).decode()})

    async def refused(self, request):
        raise HTTPException(404, "expected the id of a scan")

    async def broken(self, request):
        raise ZeroDivisionError

    async def file(self, request):
        return FileResponse(__file__)


def ask(in_threads, server, questions):
    """Run ``questions(client)`` against the server in threads, in an event loop."""

    async def run():
        transport = httpx.ASGITransport(app=in_threads(server.app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.wait_for(questions(client), 60)

    return asyncio.run(run())


def test_while_scans_are_searched_others_are_answered_and_searches_wait_in_line(in_threads):
    server = Server()

    async def questions(client):
        body = b"x" * 3_000_000  # more than one piece
        searches = [asyncio.create_task(client.post("/infer/m", content=body)) for _ in range(60)]
        while not server.detecting:
            await asyncio.sleep(0.01)
        for _ in range(20):
            assert (await client.post("/info/", content=b"hello")).json() == {"sent": "hello"}
        assert not any(search.done() for search in searches)
        server.go_on.set()
        return [search.json() for search in await asyncio.gather(*searches)]

    answers = ask(in_threads, server, questions)
    assert answers == [{"bytes": 3_000_000}] * 60
    assert server.most_at_once == 1


def test_what_starts_tasks_stays_in_the_thread_of_the_server(in_threads):
    server = Server()

    async def questions(client):
        for path in ("/train/nodule_detection", "/scoring/s", "/batch/infer/m", "/info/"):
            await client.post(path)

    ask(in_threads, server, questions)
    here = threading.get_ident()
    assert {path: thread == here for path, thread in server.threads.items()} == {
        "/train/nodule_detection": True,
        "/scoring/s": True,
        "/batch/infer/m": True,
        "/info/": False,
    }


def test_errors_and_files_arrive_as_they_are(in_threads):
    async def questions(client):
        return [await client.get(path) for path in ("/refused/", "/broken/", "/file/")]

    refused, broken, file = ask(in_threads, Server(), questions)
    assert (refused.status_code, refused.text) == (404, "expected the id of a scan")
    assert broken.status_code == 500
    assert file.content == Path(__file__).read_bytes()
