"""Tests of data/shards/copies.py: servers that are slow, fall silent, break off, and know byte ranges or do not."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest
from fsspec.implementations.http import HTTPFileSystem

from bridle_hf.data.shards import copies


CONTENT = bytes(range(256)) * 2000
HALF = len(CONTENT) // 2


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    """Waits of a fraction of a second, also that for a whole request, which aiohttp has by itself."""
    monkeypatch.setenv("BRIDLE_SHARD_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(copies, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(copies, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1))
    HTTPFileSystem.clear_instance_cache()


class Server:
    """Serves `CONTENT` as `/a.tar`.

    Args:
        send: given a request's number and what it should get, what comes of it: an iterator of bytes; when it ends
            before all of them, so does the connection.
        ranges: whether it knows them.
    """

    def __init__(self, send: Callable[[int, bytes], Iterator[bytes]], ranges: bool):
        self.send, self.ranges, self.content, self.tag = send, ranges, CONTENT, '"1"'
        self.asked: list[str | None] = []  # the header Range of each GET
        self.sent = 0

    def start_of(self, given: str | None, condition: str | None) -> int:
        if given is None or not self.ranges or condition not in (None, self.tag):
            return 0
        return int(re.fullmatch(r"bytes=(\d+)-", given)[1])


@contextmanager
def running(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.headers_of(0)

        def do_GET(self):
            server.asked.append(self.headers["Range"])
            start = server.start_of(self.headers["Range"], self.headers["If-Range"])
            self.headers_of(start)
            for block in server.send(len(server.asked) - 1, server.content[start:]):
                self.wfile.write(block)
                server.sent += len(block)

        def headers_of(self, start: int):
            size = len(server.content)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(size - start))
            self.send_header("ETag", server.tag)
            self.end_headers()

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/a.tar"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def fetched(url: str) -> bytes:
    with copies.opened(url, lambda path: open(path, "rb")) as file:
        return file.read()


def half_then(last: Callable[[], None]) -> Callable[[int, bytes], Iterator[bytes]]:
    """The first request gets half of it and then what `last` does, others the whole."""

    def send(number: int, content: bytes) -> Iterator[bytes]:
        yield content if number else content[:HALF]
        if not number:
            last()

    return send


def test_a_request_may_take_long():
    """Drop by drop, for longer than a whole request may take by aiohttp's own limit."""

    def drip(number: int, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), len(content) // 15):
            time.sleep(0.1)
            yield content[start : start + len(content) // 15]

    server = Server(drip, ranges=False)
    with running(server) as url:
        assert fetched(url) == CONTENT
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("breaks", ["cuts the connection", "falls silent"])
def test_what_has_come_is_not_asked_for_again(ranges, breaks):
    silent = threading.Event()
    server = Server(half_then((lambda: None) if breaks == "cuts the connection" else silent.wait), ranges)
    with running(server) as url:
        try:
            assert fetched(url) == CONTENT
        finally:
            silent.set()
    assert server.asked == [None, f"bytes={HALF}-"]
    assert server.sent == len(CONTENT) + (0 if ranges else HALF)


def test_patience_lasts_while_something_comes():
    """A server that gives a tenth at a time: more attempts than would be made in vain."""
    server = Server(lambda number, content: iter([content[: len(CONTENT) // 10]]), ranges=True)
    with running(server) as url:
        assert fetched(url) == CONTENT
    assert len(server.asked) == 10 and server.sent == len(CONTENT)


def test_patience_ends_where_nothing_more_comes():
    server = Server(lambda number, content: iter([content[:HALF]]), ranges=False)
    with running(server) as url, pytest.raises(ConnectionError, match=r"a\.tar: cannot be copied: ClientPayloadError"):
        fetched(url)
    assert len(server.asked) == 3  # the first, which brought half, and two in vain


def test_a_shard_that_changes_on_the_way_is_the_new_one():
    """Halves of two versions are no shard."""
    server = Server(half_then(lambda: None), ranges=True)

    def change(number: int, content: bytes) -> Iterator[bytes]:
        yield content if number else content[:HALF]
        server.content, server.tag = CONTENT[::-1], '"2"'

    server.send = change
    with running(server) as url:
        assert fetched(url) == CONTENT[::-1]
    assert server.asked == [None, f"bytes={HALF}-"]


def test_a_shard_that_has_shrunk_on_the_way():
    """What is there is longer than the new version: it begins anew."""

    def shrink(number: int, content: bytes) -> Iterator[bytes]:
        yield content if number else content[:HALF]
        server.content, server.tag = CONTENT[:1000], '"2"'

    server = Server(shrink, ranges=False)
    with running(server) as url, pytest.raises(ConnectionError, match=f"1000 of {len(CONTENT)} bytes came"):
        fetched(url)
    with running(server) as url:
        assert fetched(url) == CONTENT[:1000]
