"""Servers on loopback for tests of remote files: an object store, and servers that misbehave."""

import http.client
import http.server
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field

SECRET = "hunter2hunter2"
# the store looks at who signed, not at the signature
SIGNED = (
    "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)


class Store:
    """An S3 service, looked at from outside by plain requests."""

    def __init__(self, port):
        self.endpoint = f"http://127.0.0.1:{port}"

    def ask(self, method, path, data=None):
        request = urllib.request.Request(f"{self.endpoint}/{path}", data=data, method=method)
        request.add_header("Content-Type", "application/octet-stream")  # the default says that it is a form
        request.add_header("Authorization", SIGNED)
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.read()

    def put(self, path, data):
        self.ask("PUT", path, data)

    def get(self, path):
        """The object's content, None where there is none."""
        try:
            return self.ask("GET", path)
        except urllib.error.HTTPError as error:
            assert error.code == 404
            return None


@contextmanager
def serving(handler):
    """A server of the handler on a free port; yields the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class FolderHandler(http.server.SimpleHTTPRequestHandler):
    """Python's own file server, without its log; `functools.partial` gives the folder."""

    def log_message(self, *args):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    """What the servers here have in common: whole answers, whole bodies, no log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True

    def whole_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body


def cutting_handler(content, sent_bytes, *, chunked=False, head_status=200):
    """Announces the whole content and hangs up after `sent_bytes` of it."""

    class Cutting(Handler):
        def do_HEAD(self):
            self.answer(head_status, {"Content-Length": str(len(content))})

        def do_GET(self):
            first, last = self._range()
            self.send_response(206 if "Range" in self.headers else 200)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(last - first))
            self.end_headers()
            part = content[first : min(last, sent_bytes)]
            # no chunk of no bytes: it would say that this was the end
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked and part else part)
            self.hang_up()

        def _range(self):
            if "Range" not in self.headers:
                return 0, len(content)
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            return int(first), min(int(last) + 1, len(content))

    return Cutting


def refusing_handler(code):
    """An object store that refuses everything with an S3 error code."""

    class Refusing(Handler):
        def refuse(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(
                403,
                {"Content-Type": "application/xml"},
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode(),
            )

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = refuse

    return Refusing


def uploading_handler(operations, *, start_delay=None, part_status=200):
    """An object store that takes multipart uploads and appends what happens to `operations`.

    `start_delay` is called before an upload's start is answered; parts are answered with `part_status`.
    """

    class Uploading(Handler):
        def do_POST(self):
            self.whole_body()
            if self.path.endswith("?uploads"):
                operations.append(("start", self.path, b""))
                if start_delay is not None:
                    start_delay()
                self._xml("InitiateMultipartUploadResult", "<UploadId>u1</UploadId>")
            else:
                operations.append(("complete", self.path, b""))
                self._xml("CompleteMultipartUploadResult", "<ETag>e</ETag>")

        def do_PUT(self):
            operations.append(("part", self.path, self.whole_body()))
            self.answer(part_status, {"ETag": '"e"'})

        def do_DELETE(self):
            operations.append(("abort", self.path, b""))
            self.answer(204)

        def _xml(self, root, inner):
            body = f"<?xml version='1.0'?><{root}>{inner}</{root}>".encode()
            self.answer(200, {"Content-Type": "application/xml"}, body)

    return Uploading


@dataclass
class Fault:
    """What the proxy does to requests of one kind, a number of times.

    `method` and `path` (a part of it) say which requests; `times` how many of them, from the first one on.
    `status`: answered so, and not passed on. `sent_bytes`: passed on, and the answer's body cut after so many
    bytes. `received_bytes`: hung up after so many bytes of the request's body, nothing passed on. `drip_s`:
    the answer's body comes in 16 pieces, with such a pause before each. `silent`: the answer's body stops
    after `sent_bytes`, and the connection stays open.
    """

    method: str
    path: str = ""
    times: int = 1
    status: int | None = None
    headers: dict = field(default_factory=dict)
    sent_bytes: int | None = None
    received_bytes: int | None = None
    drip_s: float = 0.0
    silent: bool = False
    met: int = 0


@contextmanager
def faulty_proxy(upstream_port, *faults):
    """A proxy before a server on loopback; yields its port and a log of (method, path, what happened)."""
    log, lock, over = [], threading.Lock(), threading.Event()

    def fault_for(method, path):
        with lock:
            for fault in faults:
                if fault.method == method and fault.path in path and fault.met < fault.times:
                    fault.met += 1
                    return fault
        return None

    class Proxy(Handler):
        def pass_on(self):
            fault = fault_for(self.command, self.path)
            log.append((self.command, self.path, "passed on" if fault is None else "hurt"))
            if fault is not None and fault.received_bytes is not None:
                self.rfile.read(fault.received_bytes)
                self.hang_up()
                return
            body = self.whole_body()
            if fault is not None and fault.status is not None:
                self.answer(fault.status, fault.headers)
                return
            self.relay(*self.asked_upstream(body), fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = pass_on

        def asked_upstream(self, body):
            upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=30)
            framing = ("transfer-encoding", "content-length")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in framing}
            upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = upstream.getresponse()
            content = response.read()
            upstream.close()
            return response, content

        def relay(self, response, content, fault):
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name not in ("Transfer-Encoding", "Connection", "Server", "Date"):
                    self.send_header(name, value)
            if response.getheader("Content-Length") is None:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is None:
                self.wfile.write(content)
                return
            cut = content[: fault.sent_bytes]
            step = max(1, len(cut) // 16)
            for start in range(0, len(cut), step):
                over.wait(fault.drip_s)
                self.wfile.write(cut[start : start + step])
            if fault.silent:
                over.wait()
            if fault.sent_bytes is not None:
                self.hang_up()

    with serving(Proxy) as port:
        try:
            yield port, log
        finally:
            over.set()
