"""A web server that answers what no server should: each file costs one error, and bounded memory."""

import resource
import socketserver
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from pipeline.errors import ShardError, UserError
from pipeline.storage import web
from pipeline.storage.reading import open_shard, read_text
from pipeline.storage.sources import ShardSource

pytestmark = pytest.mark.usefixtures("only_loopback")

OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
ZEROS = bytes(1 << 20)
MOST_GROWTH_KIB = 200 << 10
# what is sent once, what is sent without end, and what the error says
ANSWERS = {
    "a chunk of size -1": (OK + CHUNKED + b"-1\r\n", ZEROS, "chunk of a negative size"),
    "a chunk of size -5": (OK + CHUNKED + b"-5\r\nabc", b"", "chunk of a negative size"),
    "trailers": (OK + CHUNKED + b"3\r\nabc\r\n0\r\n", b"X: y\r\n" * 1000, "1,000 lines of headers"),
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "1,000 lines of headers"),
    "a redirect with a body": (b"HTTP/1.1 302 x\r\nLocation: http://127.0.0.1:1/\r\n\r\n", ZEROS, "refused"),
    "a part": (b"HTTP/1.1 206 x\r\nContent-Length: 3\r\n\r\nabc", b"", "a part of the file"),
}


@contextmanager
def answering(once, without_end):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with suppress(OSError):
                self.request.sendall(once)
                while without_end:
                    self.request.sendall(without_end)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/0.tar"
        finally:
            server.shutdown()
            thread.join()


def read_shard(url):
    with open_shard(ShardSource("0", url, url, None, None)) as stream:
        stream.read()


@pytest.mark.parametrize(("read", "kind"), [(read_text, UserError), (read_shard, ShardError)])
@pytest.mark.parametrize(("once", "without_end", "told"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_is_false_or_never_ends_costs_one_error(
    monkeypatch, read, kind, once, without_end, told
):
    monkeypatch.setattr(web, "ATTEMPTS", 1)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(once, without_end) as url, pytest.raises(kind, match=told):
        read(url)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < MOST_GROWTH_KIB


def test_a_redirect_leads_to_the_file_whatever_its_body_is():
    with answering(OK + b"Content-Length: 3\r\n\r\nabc", b"") as target:
        moved = f"HTTP/1.1 302 x\r\nLocation: {target}\r\nContent-Length: 9999\r\n\r\n".encode()
        with answering(moved, ZEROS) as url:
            assert read_text(url) == "abc"
