"""An object store on this machine: the part of S3 that is used here, over HTTP, with faults on demand.

Objects lie in memory under "bucket/key", and the same paths serve plain http:// readers. Each request may meet a fault:

500, 503, 429, 403, 404, 416, ...   the status, with a small body
reset      half of the body, then the connection is reset
short      half of the body with an orderly end of the connection
less       half of the body, announced as if it were what was asked for
drip       a body of 1 KB/s
stall      headers, then nothing
more       a body that is longer than what was asked for
changed    the object gets another ETag, for good, before this request is answered
"""

import hashlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

RATES = {"500": 0.08, "503": 0.08, "429": 0.04, "reset": 0.05, "short": 0.04, "less": 0.03, "drip": 0.03}
"""Shares of requests that fail in a bad night: 20 % by status, 15 % in the body."""


class ObjectStore(ThreadingHTTPServer):
    """The server; use `serve`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.script: dict[tuple[str, str], list[str]] = {}
        """(method, path): faults of the coming requests, one after another; "" is none, a last "*" repeats the one before."""
        self.rates: dict[str, float] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        """Bytes of bodies sent by GET."""
        self.authorized: list[bool] = []
        self.delay_s = 0.0
        """Wait before each GET is answered."""
        self.bytes_per_s = 0.0
        """Speed of every body; 0: as fast as it goes."""
        self.lock = threading.Lock()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.versions: Counter[str] = Counter()
        self._random = random.Random(7)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """What tells an S3 client to come here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def count(self, method: str, path: str) -> int:
        return sum(entry == (method, path) for entry in self.requests)

    def fault_of(self, method: str, path: str) -> str:
        with self.lock:
            planned = self.script.get((method, path))
            if planned:
                return planned[0] if planned[1:] == ["*"] else planned.pop(0)
            draw = self._random.random()
            for fault, share in self.rates.items():
                if draw < share:
                    return fault
                draw -= share
            return ""

    def etag(self, path: str) -> str:
        return f'"{hashlib.md5(self.objects[path]).hexdigest()}-{self.versions[path]}"'

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested here."""


@contextmanager
def serve() -> Iterator[ObjectStore]:
    """A store on a free port, gone with the block."""
    server = ObjectStore()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ObjectStore

    def log_message(self, *_: Any) -> None:
        pass

    def _begin(self) -> tuple[str, dict[str, list[str]], bytes, str]:
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            self.server.authorized.append("Authorization" in self.headers)
        return path, parse_qs(parts.query, keep_blank_values=True), body, self.server.fault_of(self.command, path)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int) -> None:
        codes = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange", 503: "SlowDown"}
        code = codes.get(status, "Error")
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def do_HEAD(self) -> None:
        path, _, _, fault = self._begin()
        if fault.isdigit():
            self._refuse(int(fault))
        elif path not in self.server.objects:
            self._refuse(404)
        else:
            size = str(len(self.server.objects[path]))
            self.send_response(200)
            for name, value in self._about(path).items():
                self.send_header(name, value)
            self.send_header("Content-Length", size)
            self.end_headers()

    def _about(self, path: str) -> dict[str, str]:
        return {"ETag": self.server.etag(path), "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT", "Accept-Ranges": "bytes"}

    def do_GET(self) -> None:
        path, query, _, fault = self._begin()
        if "list-type" in query:
            self._list(path, query) if not fault.isdigit() else self._refuse(int(fault))
            return
        time.sleep(self.server.delay_s)
        if fault == "changed":
            self.server.versions[path] += 1
        if fault.isdigit():
            self._refuse(int(fault))
        elif path not in self.server.objects:
            self._refuse(404)
        elif self.headers.get("If-Match", self.server.etag(path)) != self.server.etag(path):
            self._refuse(412)
        else:
            self._send(path, fault)

    def _send(self, path: str, fault: str) -> None:
        content = self.server.objects[path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert asked, "one range from a start on"
        start, end = int(asked[1]), min(len(content), int(asked[2] or len(content)) + 1)
        if start >= end:
            self._refuse(416)
            return
        body = content[start:end]
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in self._about(path).items():
            self.send_header(name, value)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if fault == "more":
            body += b"more"
        announced = len(body) // 2 if fault == "less" else len(body)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if fault == "stall":
            time.sleep(30)
        if fault in ("reset", "short", "less"):
            body = body[: len(body) // 2]
        self._write(path, body, bytes_per_s=1000 if fault == "drip" else self.server.bytes_per_s)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault in ("reset", "short"):
            self.close_connection = True

    def _write(self, path: str, body: bytes, *, bytes_per_s: float) -> None:
        piece = max(100, int(bytes_per_s / 10)) if bytes_per_s else 1 << 20
        for start in range(0, len(body), piece):
            sent = self.wfile.write(body[start : start + piece])
            with self.server.lock:
                self.server.sent[path] += sent
            if bytes_per_s:
                time.sleep(sent / bytes_per_s)

    def _list(self, path: str, query: dict[str, list[str]]) -> None:
        """Pages of 1,000 names; the token is the number of names already given."""
        bucket = path.rstrip("/")
        prefix, first = query.get("prefix", [""])[0], int(query.get("continuation-token", ["0"])[0])
        names = sorted(name.removeprefix(bucket + "/") for name in self.server.objects if name.startswith(f"{bucket}/{prefix}"))
        page, rest = names[first : first + 1000], names[first + 1000 :]
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.server.objects[f'{bucket}/{name}'])}</Size>"
            f"<LastModified>2006-01-02T15:04:05.000Z</LastModified><ETag>x</ETag></Contents>"
            for name in page
        )
        more = f"<NextContinuationToken>{first + 1000}</NextContinuationToken>" if rest else ""
        truncated = "true" if rest else "false"
        text = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>"
        self._answer(200, text.encode(), Content_Type="application/xml")

    def do_PUT(self) -> None:
        path, query, body, fault = self._begin()
        if fault.isdigit():
            self._refuse(int(fault))
        elif "uploadId" in query:
            self.server.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        else:
            self.server.objects[path] = body
            self._answer(200, ETag=self.server.etag(path))

    def do_POST(self) -> None:
        path, query, body, fault = self._begin()
        if fault.isdigit():
            self._refuse(int(fault))
        elif "uploads" in query:
            with self.server.lock:
                name = f"upload-{len(self.server.uploads)}"
                self.server.uploads[name] = {}
            bucket, _, key = path.partition("/")
            inner = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
            self._answer(200, f"<InitiateMultipartUploadResult>{inner}</InitiateMultipartUploadResult>".encode())
        elif "uploadId" in query:
            parts = self.server.uploads.pop(query["uploadId"][0])
            self.server.objects[path] = b"".join(part for _, part in sorted(parts.items()))
            tag = escape(self.server.etag(path))
            self._answer(200, f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>".encode())
        else:  # ?delete: many at once
            keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for key in keys:
                self.server.objects.pop(f"{path.rstrip('/')}/{key}", None)
            gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        path, query, _, fault = self._begin()
        if fault.isdigit():
            self._refuse(int(fault))
        elif "uploadId" in query:
            self.server.uploads.pop(query["uploadId"][0], None)
            self._answer(204)
        else:
            self.server.objects.pop(path, None)
            self._answer(204)
