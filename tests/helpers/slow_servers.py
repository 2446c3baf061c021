"""Servers on loopback that accept connections and then answer slowly, or never."""

import socketserver
import threading
from contextlib import contextmanager, suppress

OK = b"HTTP/1.1 200 OK\r\n"
HEADERS = OK + b'ETag: "1"\r\nContent-Length: 1000000\r\n\r\n'
RESUMED = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-999999/1000000\r\nContent-Length: %d\r\n\r\n"
)


@contextmanager
def dripping(once=b"", drop=b"", pause_s=0.02):
    """A server that sends `once`, then `drop` after each pause; without a drop it stays silent.

    A request for the rest of a file is answered as such, with the same drops. Yields the address, and a list
    with the first line of each request.
    """
    over, requests = threading.Event(), []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            request = self.request.recv(1 << 16)
            requests.append(request.partition(b"\r\n")[0].decode())
            with suppress(OSError):
                self.request.sendall(self.beginning(request))
                while not over.wait(pause_s):
                    self.request.sendall(drop)

        def beginning(self, request):
            _, wants_rest, rest = request.partition(b"Range: bytes=")
            if not wants_rest:
                return once
            first = int(rest.partition(b"-")[0])
            return RESUMED % (first, 1_000_000 - first)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", requests
        finally:
            over.set()
            server.shutdown()
            thread.join()
