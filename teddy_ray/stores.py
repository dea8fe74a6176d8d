"""File systems by path or URI. Those that are not local are patient: what fails is tried again while that may help."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem
from teddy_ray.retries import persist

STREAM_BYTES = 8 * 2**20
"""What a stream asks for at once: a request to an object store takes as long as some megabytes."""

GCS_PATIENCE_S = 10
"""How long Arrow's client of GCS tries by itself; it would for a quarter of an hour, without a word."""

SCHEMES = {"s3": "s3", "gcs": "gs", "abfs": "abfs"}
"""Arrow's name of a file system -> the scheme of its URIs."""

PASSWORD = re.compile(r"s3://[^/?#@:]*:[^@?#]*@|[^:]+://[^/?#@:]*:(?!\d+/)[^@?#]*@")
"""Before the host; what may be a port, which a bucket has not, is none."""
SECRETS = re.compile(r"[?&][^=&]*(?:secret|token|password|key|credential|sas)[^=&]*=", re.IGNORECASE)


def open_uri(uri: str, key: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, or of a URI that pyarrow.fs opens, and the path in it.

    key: what named it, for errors. Raises InputError where it has credentials in it, ValueError, OSError or
    ArrowNotImplementedError where there is no such file system, and StoreError as `persist` does: where no region is
    named, S3 is asked for that of the bucket.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    scheme, _, rest = uri.partition("://")
    plain = unquote(uri)
    if PASSWORD.match(plain) or SECRETS.search(plain) or "@" in plain.partition("?")[2]:  # of an endpoint there
        remedy = "a recipe is published with its run; give credentials by the environment, such as AWS_ACCESS_KEY_ID"
        raise InputError([Problem(key, f"{scheme}://... with credentials in it", remedy)])
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in rest:
        uri += f"{'&' if '?' in rest else '?'}retry_limit_seconds={GCS_PATIENCE_S}"
    fs, path = persist(lambda: pafs.FileSystem.from_uri(uri), "opening it", uri)
    return (fs if isinstance(fs, pafs.LocalFileSystem) else patient(fs)), path


def join(uri: str, path: str) -> str:
    """The URI, or path, of what lies at `path` below another."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{base.rstrip('/')}/{path}{mark}{query}"


def patient(fs: pafs.FileSystem) -> pafs.FileSystem:
    """The same files. Operations on them raise FileNotFoundError, or StoreError after all patience. Picklable."""
    return pafs.PyFileSystem(_Patient(fs))


@dataclass(frozen=True)
class _Patient(pafs.FileSystemHandler):  # type: ignore[misc]
    """Passes everything on to another file system. Files are read, and written when they are closed, with patience."""

    fs: pafs.FileSystem

    def _do(self, doing: str, path: str, action: Callable[[], Any]) -> Any:
        scheme = SCHEMES.get(self.fs.type_name)
        return persist(action, doing, f"{scheme}://{path}" if scheme else path)

    def get_type_name(self) -> str:
        return f"patient {self.fs.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self.fs.normalize_path(path))

    def get_file_info(self, paths: Sequence[str]) -> list[pafs.FileInfo]:
        return list(self._do("looking it up", ", ".join(paths), lambda: self.fs.get_file_info(paths)))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return list(self._do("listing it", selector.base_dir, lambda: self.fs.get_file_info(selector)))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do("making the folder", path, lambda: self.fs.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._do("deleting it", path, lambda: self.fs.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._do("deleting it", path, lambda: self.fs.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody means to delete all of a store")

    def delete_file(self, path: str) -> None:
        self._do("deleting it", path, lambda: self.fs.delete_file(path))

    def move(self, source: str, target: str) -> None:
        self._do("moving it", source, lambda: self.fs.move(source, target))

    def copy_file(self, source: str, target: str) -> None:
        self._do("copying it", source, lambda: self.fs.copy_file(source, target))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(_Reader(self, path), STREAM_BYTES), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self, path, metadata), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("objects are replaced whole")


class _Reader(io.RawIOBase):
    """A file that is opened again where reading it fails."""

    def __init__(self, store: _Patient, path: str) -> None:
        self._store, self._path, self._position = store, path, 0
        self._file: pa.NativeFile | None = None
        self._size: int = self._store._do("reading it", path, lambda: self._attempt(lambda file: file.size()))

    def _attempt(self, action: Callable[[pa.NativeFile], Any]) -> Any:
        try:
            if self._file is None:
                self._file = self._store.fs.open_input_file(self._path)
            return action(self._file)
        except OSError:
            self._file = None
            raise

    def _read(self, file: pa.NativeFile, size: int) -> bytes:
        file.seek(self._position)
        return bytes(file.read(size))

    def read(self, size: int | None = -1) -> bytes:
        left = self._size - self._position
        size = left if size is None or size < 0 else min(size, left)
        if size <= 0:
            return b""
        data: bytes = self._store._do(
            "reading it", self._path, lambda: self._attempt(lambda file: self._read(file, size))
        )
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file = None
        super().close()


class _Writer:
    """A file that is written when it is closed, so that it can be written again.

    One that is only dropped, by whoever failed to fill it, is not written: an io.IOBase would be closed then. But a
    `with` block closes it, and so writes it, after an error too: `Storage.write` uses none.
    """

    def __init__(self, store: _Patient, path: str, metadata: Any) -> None:
        self._store, self._path, self._metadata = store, path, metadata
        self._parts: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is written before all is there."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._store._do("writing it", self._path, self._write)

    def _write(self) -> None:
        with self._store.fs.open_output_stream(self._path, metadata=self._metadata or None) as stream:
            for part in self._parts:
                stream.write(part)
