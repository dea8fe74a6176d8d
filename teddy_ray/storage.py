"""Content-addressed artifacts: artifacts/<stage>/<fingerprint>/ with a manifest, published whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs

from teddy_ray.errors import InputError, Problem, StoreError
from teddy_ray.retries import patience
from teddy_ray.stores import join, open_uri

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
CLOSE_ATTEMPTS = 10
CHECK_PATIENCE_S = 10.0
"""For what is asked before work starts, by somebody who waits, and when it is over."""
DIGEST = 16
"""Digits of its hash that a file's name begins with, where files cannot be published together."""


def sha256(data: bytes) -> str:
    """The hash, in hexadecimal, that manifests and seals hold."""
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any) -> str:
    """The one way JSON is written: sorted, indented, with a final newline, so that equal content is equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A published artifact. manifest["files"] holds size and SHA-256 of each file, and its path in the folder where
    that is not its name; the rest is the stage's own."""

    storage: Storage
    path: str
    manifest: Mapping[str, Any]

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises InputError where they are not those that were published."""
        entry = self.manifest["files"][name]
        path = f"{self.path}/{entry.get('path', name)}"
        try:
            data = self.storage.read(path)
        except FileNotFoundError:
            raise _broken(self.storage.display(path), "the file is gone") from None
        if sha256(data) != entry["sha256"]:
            raise _broken(self.storage.display(path), "the file has changed since")
        return data

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        from safetensors.torch import load  # here, for a run that only looks needs no torch

        return load(self.read(name))


def _broken(path: str, what: str) -> InputError:
    remedy = f"{what}; delete its folder and the artifacts that refer to it, and run again"
    return InputError([Problem("storage", path, remedy)])


class Draft:
    """An artifact in the making: files are written under `folder`, facts go into the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write(name, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))


class Storage:
    """A path or any URI that pyarrow.fs opens. Picklable; workers of one session share its staging folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.session = uuid.uuid4().hex
        try:
            with patience(CHECK_PATIENCE_S):
                self.fs, self.root = open_uri(uri, "storage")
        except InputError:
            raise
        except (ValueError, OSError, pa.ArrowNotImplementedError, StoreError) as error:
            if isinstance(error, StoreError) and not error.is_final:
                raise
            raise InputError(
                [Problem("storage", uri, f"give a path or a URI such as s3://bucket/folder ({error})")]
            ) from None
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)

    # -- files -------------------------------------------------------------------------------------------------

    def read(self, path: str, num_bytes: int | None = None) -> bytes:
        """The whole file, or its beginning."""
        with self.fs.open_input_file(f"{self.root}/{path}") as file:  # a stream would ask a store for every 256 kB
            data: bytes = file.read(num_bytes)
        return data

    def write(self, path: str, data: bytes) -> None:
        """Write one file so that a reader sees the old bytes or the new, never a part."""
        target = f"{self.root}/{path}"
        if not self.is_local:  # object stores replace an object whole, and need no folders
            stream = self.fs.open_output_stream(target)
            stream.write(data)
            stream.close()  # not by `with`, which writes after an error, too, what there is by then
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        partial = Path(self.session_folder("files"), uuid.uuid4().hex)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, target)

    def delete_file(self, path: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{path}")

    def delete_folder(self, path: str) -> None:
        """Delete a folder with all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(f"{self.root}/{path}")

    def move_folder(self, path: str, target: str, *, marks: Sequence[str] = ()) -> None:
        """Give a folder another name; at once on a local file system, by copying elsewhere.

        marks: files in it by which it is taken as whole: copied last, and deleted first.
        """
        source = f"{self.root}/{path}"
        if self.is_local:
            self.fs.move(source, f"{self.root}/{target}")
            return
        infos = self.fs.get_file_info(pafs.FileSelector(source, recursive=True))
        names = {info.path.removeprefix(f"{source}/") for info in infos if info.type == pafs.FileType.File}
        there = [name for name in marks if name in names]

        def copy(name: str) -> None:
            self.fs.copy_file(f"{source}/{name}", f"{self.root}/{target}/{name}")

        with ThreadPoolExecutor(16) as threads:  # each waits for the store
            list(threads.map(copy, sorted(names.difference(there))))
        for name in there:
            copy(name)
        for name in there:
            self.delete_file(f"{path}/{name}")
        self.delete_folder(path)

    def is_empty(self, path: str) -> bool:
        """Whether a folder holds nothing."""
        return self.is_folder(path) and not self.fs.get_file_info(pafs.FileSelector(f"{self.root}/{path}"))

    def is_file(self, path: str) -> bool:
        return bool(self.fs.get_file_info(f"{self.root}/{path}").type == pafs.FileType.File)

    def is_folder(self, path: str) -> bool:
        return bool(self.fs.get_file_info(f"{self.root}/{path}").type == pafs.FileType.Directory)

    def files(self, path: str) -> list[str]:
        """The files in a folder, sorted; none where there is no such folder."""
        selector = pafs.FileSelector(f"{self.root}/{path}", allow_not_found=True)
        found = (entry for entry in self.fs.get_file_info(selector) if entry.type == pafs.FileType.File)
        return sorted(f"{path}/{entry.base_name}" for entry in found)

    def display(self, path: str) -> str:
        """How a person would name the path."""
        if self.is_local:
            return os.path.relpath(f"{self.root}/{path}") if self.uri == "." else os.path.join(self.uri, path)
        return join(self.uri, path)

    def check_writable(self) -> None:
        """Raises InputError where nothing can be written; leaves nothing (on S3 an empty object, the folder)."""
        try:
            if self.is_local:
                existing = Path(self.root)
                while not existing.exists() and existing != existing.parent:
                    existing = existing.parent
                with tempfile.TemporaryFile(dir=existing):
                    return
            with patience(CHECK_PATIENCE_S):
                probe = f".probe-{self.session}"
                self.write(probe, b"")
                self.delete_file(probe)
        except (OSError, StoreError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError([Problem("storage", self.uri, f"name a place that can be written ({reason})")]) from None

    # -- artifacts ---------------------------------------------------------------------------------------------

    def has(self, stage: str, fingerprint: str) -> bool:
        return self.is_file(f"artifacts/{stage}/{fingerprint}/{MANIFEST}")

    def published(self, stage: str) -> set[str]:
        """The fingerprints of all artifacts of a stage, by one listing."""
        selector = pafs.FileSelector(f"{self.root}/artifacts/{stage}", allow_not_found=True, recursive=True)
        manifests = (entry.path for entry in self.fs.get_file_info(selector) if entry.base_name == MANIFEST)
        return {path.rsplit("/", 2)[1] for path in manifests}

    def missing(self, stage: str, fingerprints: Iterable[str]) -> list[str]:
        """Those that are not published, in their order."""
        published = self.published(stage)
        return [fingerprint for fingerprint in fingerprints if fingerprint not in published]

    def sizes(self, stage: str) -> dict[str, int]:
        """Fingerprint -> bytes of all its files, of all artifacts of a stage, by one listing."""
        folder = f"/artifacts/{stage}"
        selector = pafs.FileSelector(f"{self.root}{folder}", allow_not_found=True, recursive=True)
        sizes: dict[str, int] = {}
        for entry in self.fs.get_file_info(selector):
            if entry.type == pafs.FileType.File:
                fingerprint = entry.path.rpartition(f"{folder}/")[2].partition("/")[0]
                sizes[fingerprint] = sizes.get(fingerprint, 0) + entry.size
        return sizes

    def open(self, stage: str, fingerprint: str) -> Artifact:
        path = f"artifacts/{stage}/{fingerprint}"
        try:
            manifest = json.loads(self.read(f"{path}/{MANIFEST}"))
        except FileNotFoundError:
            raise _broken(self.display(path), "this artifact is gone, but others refer to it") from None
        except ValueError:
            raise _broken(self.display(f"{path}/{MANIFEST}"), "the manifest cannot be read") from None
        return Artifact(self, path, manifest)

    @contextlib.contextmanager
    def publish(self, stage: str, fingerprint: str) -> Iterator[Draft]:
        """A draft that is published when the block ends, and thrown away if it raises.

        Where another worker has published the same fingerprint meanwhile, its copy stays.
        """
        staging = Path(self._staging if self.is_local else tempfile.gettempdir())
        staging.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=staging))
        try:
            draft = Draft(folder)
            yield draft
            files = {
                path.relative_to(folder).as_posix(): self._entry(path, folder)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            manifest = {**draft.facts, "stage": stage, "fingerprint": fingerprint, "files": files}
            draft.write(MANIFEST, to_json(manifest).encode())
            if self.is_local:
                self._rename(folder, f"{self.root}/artifacts/{stage}/{fingerprint}")
            elif not self.has(stage, fingerprint):
                self._upload(folder, f"artifacts/{stage}/{fingerprint}", files)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self, stage: str, fingerprint: str) -> None:
        """Delete an artifact, if it is there. Interrupted, it leaves none that looks whole."""
        path = f"artifacts/{stage}/{fingerprint}"
        if not self.has(stage, fingerprint):  # what lies there may be what another run publishes now
            return
        self.delete_file(f"{path}/{MANIFEST}")
        self.delete_folder(path)

    def close_session(self) -> None:
        """Remove the session's folder, drafts of killed workers included. Published artifacts stay."""
        folder = os.path.dirname(self._staging)
        if not self.is_local:
            with contextlib.suppress(FileNotFoundError, StoreError), patience(CHECK_PATIENCE_S):
                self.fs.delete_dir(folder)
            return
        for _ in range(CLOSE_ATTEMPTS):
            try:
                self.fs.delete_dir(folder)
            except FileNotFoundError:
                break
            except OSError:  # a worker that is being ended still writes
                time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(folder))  # only if no other session is at work

    def session_folder(self, name: str) -> str:
        """A place for files of this session alone, gone when it closes."""
        return f"{self.root}/artifacts/.staging/{self.session}/{name}"

    @property
    def _staging(self) -> str:
        return self.session_folder("drafts")

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        """What the manifest says of a file of a draft."""
        data = path.read_bytes()
        digest = sha256(data)
        entry = {"bytes": len(data), "sha256": digest}
        if self.is_local:
            return entry
        by_content = path.relative_to(folder).with_name(f"{digest[:DIGEST]}-{path.name}")
        return {**entry, "path": by_content.as_posix()}

    @staticmethod
    def _rename(folder: Path, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        folder.chmod(0o755)  # mkdtemp's folders are private
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not os.path.isfile(f"{target}/{MANIFEST}"):  # the remains of a deletion, not an artifact
                shutil.rmtree(target)
                os.rename(folder, target)

    def _upload(self, folder: Path, target: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the files, then the manifest, which is what makes the artifact exist.

        No store lets many objects appear at once, and another worker may publish the same artifact now, with other
        bytes if its machine is of another kind. So files are named by their content: whichever manifest stands there
        in the end, it names its own. Or another run discards the artifact, and deletes what is not named yet: so what
        is gone once it is named is written again.
        """
        for name, entry in files.items():
            self.write(f"{target}/{entry['path']}", (folder / name).read_bytes())
        if self.is_file(f"{target}/{MANIFEST}"):
            return
        self.write(f"{target}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        selector = pafs.FileSelector(f"{self.root}/{target}", allow_not_found=True, recursive=True)
        there = {info.path.rpartition(f"{target}/")[2] for info in self.fs.get_file_info(selector)}
        for name, entry in files.items():
            if entry["path"] not in there:
                self.write(f"{target}/{entry['path']}", (folder / name).read_bytes())
