"""A local HTTP server that misbehaves as asked, for tests of downloads.

with MisbehavingServer() as server:
    address = server.serve("file.bin", content, cut_at=[1000])
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Resource:
    """A file and how the server behaves about it."""

    content: bytes
    statuses: list[int] = field(default_factory=list)
    """Error codes that the first requests get instead of the file."""
    cut_at: list[int] = field(default_factory=list)
    """The first answers break off after so many bytes of their body, one number each."""
    ranges: bool = True
    """Whether the server can resume."""
    etag: str | None = '"1"'
    redirect: str | None = None
    declared_length: int | None = None
    """The Content-Length to announce instead of the true one; -1: none."""
    piece: int | None = None
    """Send pieces of so many bytes with pauses between, instead of all at once."""
    pause: float = 0.001
    silent: bool = False
    """Accept the request and never answer."""
    content_type: str = "application/octet-stream"
    content_encoding: str | None = None
    wrong_range: bool = False
    """Answer a request for a range with another range."""


class MisbehavingServer:
    """Serves files on 127.0.0.1; `requests` lists (path, Range header) of every request."""

    def __init__(self) -> None:
        self.resources: dict[str, Resource] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def serve(self, path: str, content: bytes = b"", **behaviour: object) -> str:
        """Serve `content` under `path`; returns its address."""
        self.resources["/" + path] = Resource(content, **behaviour)  # type: ignore[arg-type]
        return self.address(path)

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{path}"

    def ranges(self) -> Sequence[str | None]:
        return [asked for _, asked in self.requests]

    def __enter__(self) -> "MisbehavingServer":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.path, self.headers.get("Range")))
                resource = server.resources.get(self.path.partition("?")[0])
                if resource is None:
                    self._answer(404)
                elif resource.statuses:
                    self._answer(resource.statuses.pop(0))
                elif resource.redirect:
                    self._answer(302, {"Location": resource.redirect})
                elif resource.silent:
                    server.closing.wait(20)
                    self.close_connection = True
                else:
                    self._send(resource)

            def _send(self, resource: Resource) -> None:
                start, status = 0, 200
                headers = {"Content-Type": resource.content_type}
                asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
                if asked and resource.ranges and condition in (None, resource.etag):
                    start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                    if start >= len(resource.content):
                        return self._answer(416, {"Content-Range": f"bytes */{len(resource.content)}"})
                    if resource.wrong_range:
                        start //= 2
                    last = len(resource.content) - 1
                    headers["Content-Range"] = f"bytes {start}-{last}/{len(resource.content)}"
                body = resource.content[start:]
                length = len(body) if resource.declared_length is None else resource.declared_length
                if length >= 0:
                    headers["Content-Length"] = str(length)
                if resource.etag:
                    headers["ETag"] = resource.etag
                if resource.content_encoding:
                    headers["Content-Encoding"] = resource.content_encoding
                if resource.cut_at:
                    body = body[: resource.cut_at.pop(0)]
                self._head(status, headers)
                self.close_connection = True
                try:
                    if resource.piece is None:
                        self.wfile.write(body)
                    else:
                        for place in range(0, len(body), resource.piece):
                            self.wfile.write(body[place : place + resource.piece])
                            self.wfile.flush()
                            time.sleep(resource.pause)
                except OSError:
                    pass  # the client has had enough
                return None

            def _answer(self, status: int, headers: dict[str, str] | None = None) -> None:
                self._head(status, {"Content-Length": "0", **(headers or {})})

            def _head(self, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
