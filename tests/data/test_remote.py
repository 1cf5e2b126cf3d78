"""Shards on a web server and in an S3 store, both real and local: servers that drop connections, a cache with a limit."""

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megatron_nvlm.data.shards import remote as cache_module
from megatron_nvlm.data.shards.read import ShardSet, StorageError
from megatron_nvlm.data.shards.remote import CacheConfig, RemoteFolder
from megatron_nvlm.errors import UserError
from tests.support.shards import good_samples, write_samples


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges; drops what it is told to drop in the middle of an answer."""

    drops = 0
    requests: list[str] = []

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        type(self).requests.append(self.path)
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = self.headers.get("Range")
        start, end = 0, len(data)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if type(self).drops > 0:
            type(self).drops -= 1
            self.wfile.write(data[start : start + (end - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:end])


@pytest.fixture()
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = write_samples(tmp_path / "served" / "shards", good_samples(40))
    Handler.drops, Handler.requests = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/shards"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, small chunks: what is tested is that it tries again, not how long it waits."""
    monkeypatch.setattr(cache_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr("megatron_nvlm.data.shards.read.PAUSES", (0.01,))


def assert_same(remote: ShardSet, folder: Path) -> None:
    local = ShardSet(folder)
    assert len(remote) == len(local)
    for number in range(len(local)):
        assert remote.read(number) == local.read(number)


def test_a_server_that_drops_connections_loses_nothing(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    Handler.drops = 5
    shards = ShardSet(address, cache=CacheConfig(str(tmp_path / "cache")))
    assert Handler.drops == 0
    Handler.drops = 6
    assert_same(shards, folder)
    assert Handler.drops == 0 and shards.name == "shards"
    before = len(Handler.requests)
    again = ShardSet(address, cache=CacheConfig(str(tmp_path / "cache")))
    assert_same(again, folder)
    assert Handler.requests[before:] == ["/shards/index.json"], "all but the index comes from the cache"


def test_what_cannot_be_had_is_said_in_one_sentence(
    web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = web
    config = CacheConfig(str(tmp_path / "cache"), retries=2)
    shards = ShardSet(address, cache=config)
    Handler.drops = 10**9
    with pytest.raises(StorageError, match=r"shard-00000\d.tar cannot be read after 3 tries \(.*\); fix the server"):
        shards.read(0)
    Handler.drops = 0
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(StorageError, match="shard-000001.tar cannot be read .*; upload it or correct data.train"):
        shards.read(8)
    data = bytearray((folder / "shard-000002.tar").read_bytes())
    data[700] ^= 1
    (folder / "shard-000002.tar").write_bytes(data)
    with pytest.raises(StorageError, match="shard-000002.tar has other bytes than its index says"):
        shards.read(16)
    with pytest.raises(UserError, match="index.json cannot be read"):
        ShardSet(f"{address}/elsewhere", cache=config)
    with pytest.raises(UserError, match="cannot be opened"):
        ShardSet("nosuch://bucket/shards", cache=config)


def test_the_cache_keeps_its_limit(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    limit = 2.2 * max(sizes)
    shards = ShardSet(address, cache=CacheConfig(str(tmp_path / "cache"), limit_gb=limit / 1e9))
    for number in (0, 39, 8, 17, 0, 25):
        assert shards.read(number) == ShardSet(folder).read(number)
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
        assert held <= limit
    names = {path.name for path in (tmp_path / "cache").rglob("*.tar")}
    assert "shard-000003.tar" in names, "the last used stays"


def _read_all(address: str, cache: str, limit_gb: float, results: Any) -> None:
    shards = ShardSet(address, cache=CacheConfig(cache, limit_gb=limit_gb))
    results.put([shards.read(number).key for number in range(len(shards))])


def test_processes_share_a_cache_too_small_for_all(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    limit = 1.5 * max(path.stat().st_size for path in folder.glob("*.tar")) / 1e9
    context = get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_read_all, args=(address, str(tmp_path / "cache"), limit, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    expected = [f"sample_{number:04d}" for number in range(40)]
    assert [results.get(timeout=120) for _ in processes] == [expected] * 3
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


def test_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's S3 server, through s3fs."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    folder = write_samples(tmp_path / "shards", good_samples(20))
    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = boto3.client("s3", region_name="us-east-1")
        store.create_bucket(Bucket="bucket")
        for path in folder.iterdir():
            store.upload_file(str(path), "bucket", f"sets/shards/{path.name}")
        assert_same(ShardSet("s3://bucket/sets/shards", cache=CacheConfig(str(tmp_path / "cache"))), folder)
    finally:
        server.stop()


def test_a_changed_index_is_fetched_anew(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    config = CacheConfig(str(tmp_path / "cache"))
    assert len(ShardSet(address, cache=config)) == 40
    shutil.rmtree(folder)
    write_samples(folder, good_samples(16))
    assert_same(ShardSet(address, cache=config), folder)
    remote = RemoteFolder(address, config)
    assert not list(remote.folder.glob("*.partial")) and os.path.isdir(remote.folder)
