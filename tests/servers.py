"""Servers on loopback for the tests: one that fails as told and keeps a log, nginx, and S3 (moto)."""

import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

#: What a server does with one request: gets the handler of the request and the file's bytes.
Behaviour = Callable[["Handler", bytes], None]


class Request(NamedTuple):
    """One request as it came in; names of headers as written by the client."""

    path: str
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request for a path by its n-th behaviour, the last one for ever after."""

    protocol_version = "HTTP/1.1"
    server: "FaultyServer"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            number = sum(request.path == path for request in self.server.log)
            self.server.log.append(Request(path, dict(self.headers)))
        behaviours = self.server.plan.get(path, [status(404)])
        behaviours[min(number, len(behaviours) - 1)](self, self.server.files.get(path, b""))

    def answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Sends the head, and as much of a body as there is."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal quiet."""


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by `plan`: path -> behaviours, one a request; `log` is what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: dict[str, list[Behaviour]] = {}
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    def add(self, path: str, data: bytes, *behaviours: Behaviour) -> str:
        """Returns the address of a file that is served by these behaviours."""
        self.files[path], self.plan[path] = data, list(behaviours or [whole])
        return f"{self.address}{path}"

    @property
    def address(self) -> str:
        """The address of the server, without a slash behind it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path: str) -> list[Request]:
        """The requests for a path."""
        with self.lock:
            return [request for request in self.log if request.path == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    """A running FaultyServer."""
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


# --- behaviours ---------------------------------------------------------------------------------------------


def served(etag: str = '"one"', heed_if_range: bool = True) -> Behaviour:
    """A good server that knows ranges; without heed_if_range it sends a range of whatever there is now."""

    def behave(handler: Handler, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        same = handler.headers.get("If-Range") == etag or not heed_if_range
        if wanted and same and int(wanted[1]) < len(data):
            start = int(wanted[1])
            span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            head = {"ETag": etag, "Content-Length": str(len(data) - start), **span}
            handler.answer(206, head, data[start:])
        else:
            handler.answer(200, {"ETag": etag, "Content-Length": str(len(data))}, data)

    return behave


whole = served()


def status(code: int, headers: dict[str, str] | None = None) -> Behaviour:
    """An answer without the file."""
    return lambda handler, data: handler.answer(code, {"Content-Length": "0", **(headers or {})})


def html(handler: Handler, data: bytes) -> None:
    """A login page in place of the file."""
    page = b"<!DOCTYPE html><title>Log in</title>"
    handler.answer(200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page))}, page)


def unnamed_html(handler: Handler, data: bytes) -> None:
    """A page that says it is a file."""
    page = b"\n<html><body>Error</body></html>".ljust(len(data))
    handler.answer(200, {"Content-Type": "application/x-tar", "Content-Length": str(len(page))}, page)


def unranged(handler: Handler, data: bytes) -> None:
    """The whole file, whatever range was asked for."""
    handler.answer(200, {"ETag": '"one"', "Content-Length": str(len(data))}, data)


def wrong_range(handler: Handler, data: bytes) -> None:
    """Another range than the one asked for."""
    span = f"bytes 0-{len(data) - 1}/{len(data)}"
    handler.answer(206, {"ETag": '"one"', "Content-Length": str(len(data)), "Content-Range": span}, data)


def stated(difference: int) -> Behaviour:
    """A Content-Length that is wrong by so many bytes."""

    def behave(handler: Handler, data: bytes) -> None:
        handler.close_connection = True
        handler.answer(200, {"Content-Length": str(len(data) + difference)}, data)

    return behave


def cut(count: int) -> Behaviour:
    """A connection that ends after so many bytes of the body."""

    def behave(handler: Handler, data: bytes) -> None:
        handler.close_connection = True
        handler.answer(200, {"ETag": '"one"', "Content-Length": str(len(data))}, data[:count])

    return behave


def reset(count: int) -> Behaviour:
    """A connection that is reset after so many bytes of the body."""

    def behave(handler: Handler, data: bytes) -> None:
        cut(count)(handler, data)
        handler.wfile.flush()
        time.sleep(0.05)  # a reset takes back what the client has not read yet
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return behave


def stall(count: int) -> Behaviour:
    """Silence after so many bytes of the body."""

    def behave(handler: Handler, data: bytes) -> None:
        cut(count)(handler, data)
        handler.wfile.flush()
        handler.server.released.wait(30)

    return behave


def chunked(count: int) -> Behaviour:
    """A body in chunks, without a length; it ends properly only where all of the file is sent."""

    def behave(handler: Handler, data: bytes) -> None:
        handler.close_connection = True
        part = data[:count]
        body = f"{len(part):x}\r\n".encode() + part + b"\r\n" + (b"0\r\n\r\n" if part == data else b"")
        handler.answer(200, {"Transfer-Encoding": "chunked"}, body)

    return behave


def endless(handler: Handler, data: bytes) -> None:
    """A body without a length: it ends where the connection does."""
    handler.close_connection = True
    handler.answer(200, {}, data)


def redirect(location: str) -> Behaviour:
    """A redirect."""
    return status(302, {"Location": location})


def zipped(handler: Handler, data: bytes) -> None:
    """A file in an encoding that nobody asked for."""
    handler.answer(200, {"Content-Encoding": "gzip", "Content-Length": str(len(data))}, data)


# --- real servers -------------------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
{user}
events {{ worker_connections 64; }}
http {{
  log_format ranges '$request_uri $status "$http_range"';
  access_log {folder}/access.log ranges;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{
    listen 127.0.0.1:{port}; root {root};
    location /slow/ {{ alias {root}/; limit_rate 500k; }}
    location /closed/ {{ alias {root}/; auth_basic shards; auth_basic_user_file {folder}/users; }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[str]:
    """The address of an nginx that serves `root`, also slowly as /slow/ and to x:y alone as /closed/."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("nginx is not on this machine; install it to test against a real HTTP server")
    folder.mkdir(parents=True)
    (folder / "users").write_text("x:{PLAIN}y\n")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "conf").write_text(NGINX.format(folder=folder, root=root, port=port, user=user))
    command = [binary, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "conf")]
    with subprocess.Popen(command) as process:
        try:
            wait_for(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, (folder / "error.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an empty S3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moto and what it builds on, at import
        from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits until the condition holds; fails where it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
