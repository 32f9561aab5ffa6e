"""An object store on loopback for tests: moto's S3 server in a process of its own, and a faulty proxy in front of it.

The server has its own process because Arrow may wait for it while it holds Python's lock.
"""

import contextlib
import http.client
import http.server
import os
import random
import subprocess
import sys
import threading

BUCKET = "bucket"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
# Made-up credentials; and no look at a node's role, which would wait for an address that is not there.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "made-up-access-key",
    "AWS_SECRET_ACCESS_KEY": "made-up-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "6",  # a store that stays away is given up after 15 s
}
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@contextlib.contextmanager
def store():
    """A server with one empty bucket; yields its port."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            port = int(process.stdout.readline())
            client(port).create_bucket(Bucket=BUCKET)
            yield port
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def client(port):
    """A client that is not the one under test."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
    )


def objects(port, prefix=""):
    """Key → fingerprint of all objects there are."""
    pages = client(port).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}


class Faults:
    """What a proxy does to a request: `share` of them fail, in a seeded order, in one of three ways.

    All do while it is `down`, the `first` so many do, and of those it has `seen` all `after` so many.
    """

    def __init__(self, share=0.0, seed=0):
        self.share, self.random, self.lock = share, random.Random(seed), threading.Lock()
        self.down, self.first, self.after, self.seen, self.failed = False, 0, None, 0, 0

    def next(self):
        with self.lock:
            self.seen += 1
            over = self.seen <= self.first or (self.after is not None and self.seen > self.after)
            if self.down or over or self.random.random() < self.share:
                self.failed += 1
                return self.random.choice(["500", "503", "drop"])
            return None


@contextlib.contextmanager
def proxy(port, faults):
    """A server that passes requests on to the port, or fails; yields its own port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self):
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, *args):
            pass

        def body(self):
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def answer(self):
            body, fault = self.body(), faults.next()
            if fault == "drop":
                self.close_connection = True
                return
            if fault is not None:
                self.reply(int(fault), [], b"<Error><Code>SlowDown</Code></Error>")
                return
            inner = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP | {"expect"}}
            inner.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            got = inner.getresponse()
            data = got.read()
            length = got.getheader("Content-Length") if self.command == "HEAD" else None
            self.reply(got.status, [(k, v) for k, v in got.getheaders() if k.lower() not in HOP], data, length)
            inner.close()

        def reply(self, status, headers, data, length=None):
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def environment(port):
    """What a process needs to take the port for S3."""
    return {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
