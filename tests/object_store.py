"""moto's S3 on loopback, behind a gate that makes requests fail."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SLOW_S = 0.3
ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0} by the gate</Message></Error>"


class Gate:
    """A WSGI application in front of another.

    fault: given (number, method, path) of a request, the kind of fault that it meets: "500", "503", "403", "dropped",
    "slow", or None. met: (kind, method, path) of those that met one. num_requests: of all.
    """

    def __init__(self, application: Any) -> None:
        self._application, self._lock = application, threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
        self.num_requests, self.met = 0, list[tuple[str, str, str]]()

    def every(self, num: int) -> None:
        """Make one request in `num` fail, by one kind of fault after another."""
        kinds = ("500", "dropped", "503", "slow")
        self.fault = lambda number, method, path: None if number % num else kinds[number // num % len(kinds)]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.num_requests += 1
            kind = self.fault(self.num_requests, method, path)
            if kind is not None:
                self.met.append((kind, method, path))
        if kind == "dropped":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if kind in ("500", "503", "403"):
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            status, code = {
                "500": ("500 Internal Server Error", "InternalError"),
                "503": ("503 Slow Down", "SlowDown"),
                "403": ("403 Forbidden", "AccessDenied"),
            }[kind]
            start_response(status, [("Content-Type", "application/xml")])
            return [b"" if method == "HEAD" else ERROR.format(code).encode()]
        if kind == "slow":
            time.sleep(SLOW_S)
        return self._application(environ, start_response)


class ObjectStore:
    """The server, in a thread. Environment variables name it while it is open."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.gate = Gate(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", 0, self.gate, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        os.environ["AWS_ENDPOINT_URL"] = self.url

    def make_bucket(self, name: str) -> str:
        """A new one; gives its URI."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT")).close()
        return f"s3://{name}"

    def keys(self, bucket: str) -> list[str]:
        """Every key, sorted; those of empty objects that stand for folders end in a slash."""
        with urllib.request.urlopen(f"{self.url}/{bucket}?list-type=2") as answer:
            return sorted(re.findall("<Key>(.*?)</Key>", answer.read().decode()))

    def close(self) -> None:
        del os.environ["AWS_ENDPOINT_URL"]
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
