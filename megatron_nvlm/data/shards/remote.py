"""Shards of object stores and web servers, kept on this machine: downloaded whole, checked, within a limit of bytes.

Any address that fsspec knows is read (s3://, gs://, http://, ...); keys and endpoints are configured as fsspec's are, by
its configuration files or variables such as FSSPEC_S3_ENDPOINT_URL. All processes of a machine share a folder: a lock lets
one download while the others wait, and files of which a process has no need any more are removed, longest unused first.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_nvlm.errors import UserError
from megatron_nvlm.whole_files import write_whole

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
"""A download goes on from the last complete chunk when a connection drops."""
_CONNECT_SECONDS, _READ_SECONDS = 10, 30
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0

T = TypeVar("T")


class StorageError(UserError):
    """A shard cannot be reached. It ends the run: skipping would make ranks on other machines see other samples."""


@dataclass(frozen=True)
class CacheConfig:
    """Section `data.cache` of a run; of no effect for shards on a file system."""

    folder: str = "~/.cache/megatron_nvlm"
    """On this machine; its processes share it."""
    limit_gb: float = 200.0
    """Shards that were used longest ago make room for new ones."""
    retries: int = 6
    """Times that a download is tried again, after 0.5, 1, 2, ... seconds."""


def is_remote(location: str) -> bool:
    """Whether this is an address and not a folder."""
    return "://" in location


class RemoteFolder:
    """Files of one address, by way of the cache."""

    def __init__(self, address: str, config: CacheConfig) -> None:
        self.address, self.config = address.rstrip("/"), config
        name = self.address.rpartition("/")[2]
        self.root = Path(config.folder).expanduser()
        self.folder = self.root / f"{name}-{hashlib.sha256(self.address.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._opened: tuple[Any, str] | None = None

    def fetch_index(self, index_file: str) -> None:
        """Bring the index here, again if it has changed.

        Raises:
            UserError: it is not there or cannot be read.
        """
        data = self._try(lambda: self._system.cat_file(self._path(index_file)), index_file)
        with _lock(self.folder / "index.lock"):
            try:
                files: Mapping[str, Mapping[str, Any]] = json.loads(data).get("files", {})
            except (ValueError, AttributeError) as error:
                raise UserError(f"{self.address}/{index_file} is no index ({error}); build the shards again") from error
            for name, facts in files.items():
                self._download(name, int(facts["size"]), str(facts["sha256"]))
            write_whole(self.folder / index_file, data)

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """A shard's local path; it may be removed again, but not from under a process that has opened it.

        Raises:
            StorageError: it cannot be had, however often it is tried.
        """
        path = self.folder / name
        if not self._is_here(path, size):
            with _lock(self.folder / f"{name}.lock"):
                if not self._is_here(path, size):
                    self._make_room(size)
                    self._download(name, size, sha256)
        os.utime(path)
        return path

    @staticmethod
    def _is_here(path: Path, size: int) -> bool:
        return path.is_file() and path.stat().st_size == size

    @property
    def _system(self) -> Any:
        return self._open()[0]

    def _path(self, name: str) -> str:
        return f"{self._open()[1]}/{name}"

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            protocol = self.address.partition("://")[0]
            try:
                from fsspec.core import url_to_fs

                options: dict[str, Any] = {}
                if protocol in ("http", "https"):
                    from aiohttp import ClientTimeout

                    timeout = ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
                    options["client_kwargs"] = {"timeout": timeout}
                self._opened = url_to_fs(self.address, **options)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{self.address} cannot be opened ({error}); install the extra 'remote' or correct data.train"
                ) from error
        return self._opened

    def _download(self, name: str, size: int, sha256: str) -> None:
        """Into the cache, under its name only when whole; the caller holds a lock."""
        path = self.folder / name
        if self._is_here(path, size) and path.suffix != ".tar" and _hash(path) == sha256:
            return
        partial = Path(f"{path}.partial")
        for attempt in range(self.config.retries + 1):
            digest = hashlib.sha256()
            with partial.open("wb") as file:
                for start in range(0, size, CHUNK_BYTES):
                    chunk = self._chunk(name, start, min(start + CHUNK_BYTES, size), size)
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() == sha256:
                os.replace(partial, path)
                return
            logger.warning(
                "%s/%s arrived with other bytes than its index says (time %d)", self.address, name, attempt + 1
            )
        raise StorageError(
            f"{self.address}/{name} has other bytes than its index says, however often it is read; upload the shards again"
        )

    def _chunk(self, name: str, start: int, end: int, size: int) -> bytes:
        def read() -> bytes:
            data: bytes = self._system.cat_file(self._path(name), start=start, end=end)
            if len(data) == size != end - start:  # a server without ranges sends everything
                data = data[start:end]
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came for {end - start}")
            return data

        return self._try(read, name)

    def _try(self, read: Callable[[], T], name: str) -> T:
        """Call until it works, with pauses that double."""
        pause = _FIRST_PAUSE
        for attempt in range(self.config.retries + 1):
            try:
                return read()
            except UserError:
                raise
            except (FileNotFoundError, PermissionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise StorageError(
                    f"{self.address}/{name} cannot be read ({reason}); upload it or correct data.train"
                ) from error
            except Exception as error:  # every protocol has errors of its own for what may pass
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if attempt < self.config.retries:
                    logger.warning("%s/%s: %s; trying again in %.1f s", self.address, name, reason, pause)
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        raise StorageError(
            f"{self.address}/{name} cannot be read after {self.config.retries + 1} tries ({reason}); fix the server or "
            "the connection and start again: the run goes on from its last checkpoint"
        )

    def _make_room(self, size: int) -> None:
        """Remove shards that were used longest ago, until one of `size` fits the limit."""
        with _lock(self.root / "room.lock"):
            held = []
            for path in self.root.glob("*/*.tar"):
                try:
                    facts = path.stat()
                    held.append((facts.st_mtime, facts.st_size, path))
                except OSError:  # another process removed it
                    continue
            total = sum(entry[1] for entry in held)
            for _, entry_size, path in sorted(held):
                if total + size <= self.config.limit_gb * 1e9:
                    return
                path.unlink(missing_ok=True)
                total -= entry_size


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Between processes; given up by the operating system if the holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
