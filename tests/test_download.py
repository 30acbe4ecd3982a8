"""Weights over HTTP: whole and checked in the cache, or not there; offline is said at once."""

import base64
import hashlib
import http.server
import io
import sys
import threading
import time

import numpy as np
import pytest

from vit_jax.weights import download, files
from vit_jax.weights.download import NotPublicError, cache_path, fetch
from vit_jax.weights.files import read_arrays, read_json, write_npz
from vit_jax.weights.published import by_hand, web_address

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
MD5 = base64.b64encode(hashlib.md5(BODY).digest()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves by the first word of the path. `asked` has each request's (path, Range)."""

    def do_GET(self):
        server, word = self.server, self.path.split("/")[1]
        server.asked.append((self.path, self.headers["Range"]))
        if word == "hangs":
            server.done.wait(20)
            return
        if word.isdigit():
            self.send_error(int(word))
            return
        if word == "linked":
            self.send_response(302)
            self.send_header("Location", "/sha256/model.npz")
            self.send_header("X-Linked-ETag", f'"{SHA[::-1]}"')
            self.end_headers()
            return
        first = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
        body, rest = BODY, BODY
        if word == "resumes":  # 100,000 bytes an answer
            rest = BODY[first : first + 100_000]
        if word in ("cut", "stalls"):
            rest = BODY[:100_000]
        resumed = word == "resumes" and first
        self.send_response(206 if resumed else 200)
        self.send_header("Content-Length", str(len(body) - first if resumed else len(body)))
        self.send_header("Content-Type", "text/html" if word == "page" else "application/x")
        self.send_header("ETag", f'"{SHA}"' if word == "sha256" else '"1"')
        if word in ("md5", "wrong"):
            md5 = MD5 if word == "md5" else MD5[::-1][2:] + "=="
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={md5}")
        self.end_headers()
        self.wfile.write(rest)
        if word == "stalls":
            self.wfile.flush()
            server.done.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.done, server.asked = threading.Event(), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.done.set()
    server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, server):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    for variable in download.OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    server.asked.clear()
    return tmp_path / "cache"


def kept(cache):
    """What is in the cache, without the files of locks."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


@pytest.mark.parametrize("kind", ["plain", "md5", "sha256", "resumes"])
def test_whole_and_once(server, cache, kind, capsys):
    path = fetch(f"{server.url}/{kind}/model.npz")
    assert path.read_bytes() == BODY and path.is_relative_to(cache)
    assert fetch(f"{server.url}/{kind}/model.npz") == path and kept(cache) == ["model.npz"]
    ranges = [None, "bytes=100000-", "bytes=200000-"] if kind == "resumes" else [None]
    assert [r for _, r in server.asked] == ranges
    said = capsys.readouterr().err.splitlines()  # no terminal: a line at both ends
    assert said[0] == f"fetching {server.url}/{kind}/model.npz, 0.3 MB" and len(ranges) + 1 == len(
        said
    )
    assert said[-1] == "fetched model.npz"


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("cut", ConnectionError, "broke off after 100,000 of 300,000 bytes"),
        ("stalls", ConnectionError, "broke off, TimeoutError"),
        ("hangs", ConnectionError, "no answer in 1 s|TimeoutError"),
        ("wrong", ConnectionError, "its md5 is .*, the server says"),
        ("linked", ConnectionError, "its sha256 is .*, the server says"),
        ("page", ConnectionError, "a web page, such as a network's login"),
        ("500", ConnectionError, "answers 500"),
        ("404", FileNotFoundError, "answers 404"),
        ("403", NotPublicError, "answers 403"),
    ],
)
def test_nothing_is_kept_of_what_fails(server, cache, kind, error, text):
    begun = time.monotonic()
    with pytest.raises(error, match=text):
        fetch(f"{server.url}/{kind}/model.npz")
    assert time.monotonic() - begun < 5
    assert kept(cache) == (["model.npz.missing"] if kind == "404" else [])


def test_a_half_of_an_earlier_process_is_not_taken(server, cache):
    path = cache_path(f"{server.url}/plain/model.npz")
    path.parent.mkdir(parents=True)
    path.with_name("model.npz.partial").write_bytes(BODY[::-1] + b"more")
    assert fetch(f"{server.url}/plain/model.npz").read_bytes() == BODY


def test_at_once_it_is_fetched_once(server):
    """Locks of one process keep out each other as those of several do."""
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f"{server.url}/md5/model.npz")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1 and len(set(found)) == 1 and found[0].read_bytes() == BODY


@pytest.mark.parametrize("variable", download.OFFLINE)
def test_offline_uses_what_is_there(server, monkeypatch, variable):
    path = fetch(f"{server.url}/plain/model.npz")
    with pytest.raises(FileNotFoundError):
        fetch(f"{server.url}/404/preprocessor_config.json")
    monkeypatch.setenv(variable, "1")
    server.asked.clear()
    assert fetch(f"{server.url}/plain/model.npz") == path
    assert read_json(f"{server.url}/404/preprocessor_config.json") is None  # it wasn't there before
    expected = rf"can't be fetched \(offline, .*\): .*curl -LO {server.url}.*{path.parent.parent}"
    with pytest.raises(ConnectionError, match=expected) as error:
        read_arrays(f"{server.url}/md5/model.npz")
    assert "\n" not in str(error.value) and not server.asked
    monkeypatch.setenv(variable, "0")
    assert read_json(f"{server.url}/404/config.json") is None and server.asked


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"can't be written \(Not a directory\): set VIT_JAX_CACHE"):
        fetch(f"{server.url}/plain/model.npz")


def test_no_server_is_said_at_once(server):
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=r"refused.*curl -LO .*put what you fetch into"):
        read_arrays("http://127.0.0.1:9/weights/model.npz")
    assert time.monotonic() - begun < 3


def test_arrays_of_the_cache(cache, monkeypatch):
    """A damaged file names its place in the cache; a good one put there by hand is read."""
    path = cache_path(web_address("gs://vit_models/a+b/x.npz"))
    assert path == cache / "storage.googleapis.com/vit_models/a%2Bb/x.npz"
    path.parent.mkdir(parents=True)
    write_npz(path, {"a": np.ones(3)})
    np.testing.assert_array_equal(read_arrays("gs://vit_models/a+b/x.npz")["a"], np.ones(3))
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match=rf"is damaged .*to fetch it again, remove {path}"):
        read_arrays("gs://vit_models/a+b/x.npz")
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    assert cache_path("https://a.b/c").is_relative_to(cache / "xdg" / "vit_jax")


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("gs://b/c d.npz", "https://storage.googleapis.com/b/c%20d.npz"),
        ("hf://o/r", "https://huggingface.co/o/r/resolve/main/model.safetensors"),
        ("hf://o/r@v1/a/b.json", "https://huggingface.co/o/r/resolve/v1/a/b.json"),
        ("hf://datasets/o/r/b.npz", "https://huggingface.co/datasets/o/r/resolve/main/b.npz"),
        ("https://a.b/c?d", "https://a.b/c?d"),
    ],
)
def test_addresses(path, url):
    assert web_address(path) == url and by_hand(path)


@pytest.mark.parametrize("path", ["s3://a/b", "hf://o", "ftp://a/b"])
def test_other_schemes_are_refused(path):
    with pytest.raises(ValueError, match="expected a local path, gs://bucket/file"):
        read_arrays(path)


@pytest.mark.parametrize("url", ["https://a/../../x", "https:///x", "https://a", "https://a/b//c"])
def test_an_address_stays_in_the_cache(url):
    with pytest.raises(ValueError, match="expected https://host/path/of/a/file"):
        fetch(url)


def test_what_is_not_public_is_fetched_by_who_logs_in(server, cache, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(files, "web_address", lambda path: f"{server.url}/403/x.npz")
    memory = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    memory.pipe("/bucket/x.npz", buffer.getvalue())
    monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (memory, "/bucket/x.npz"))
    np.testing.assert_array_equal(read_arrays("gs://bucket/x.npz")["a"], np.ones(2))
    assert kept(cache) == []
    with pytest.raises(NotPublicError, match="answers 403"):
        read_arrays("https://bucket/x.npz")

    def absent(path):
        raise ImportError("gcsfs")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(ConnectionError, match=r"isn't public .*pip install gcsfs, or fetch it"):
        read_arrays("gs://bucket/x.npz")


def test_a_terminal_has_a_bar(server, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    fetch(f"{server.url}/plain/model.npz")
    assert "model.npz: 100%" in shown.getvalue() and "300k/300k" in shown.getvalue()
