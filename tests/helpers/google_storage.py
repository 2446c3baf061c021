"""As much of Google's object store as reading, listing and resumable uploads need, on loopback."""

import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.object_servers import Handler


def google_handler(objects):
    """A store over the dictionary `objects`: (bucket, name) to content; the bucket "gone" does not exist."""
    uploads = {}

    def described(bucket, name):
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(objects[bucket, name])),
            "generation": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    class Google(Handler):
        def do_GET(self):
            parts = urlsplit(self.path)
            options = parse_qs(parts.query)
            _, _, _, _, bucket, *rest = parts.path.split("/")
            if bucket == "gone":
                self.answer(404)
            elif not rest:
                self.json({"kind": "storage#bucket", "name": bucket})
            elif len(rest) == 1:
                prefix = options.get("prefix", [""])[0]
                names = sorted(name for where, name in objects if where == bucket and name.startswith(prefix))
                self.json({"kind": "storage#objects", "items": [described(bucket, name) for name in names]})
            else:
                self.one(bucket, unquote(rest[1]), "alt" in options)

        def one(self, bucket, name, wants_content):
            if (bucket, name) not in objects:
                self.answer(404)
            elif not wants_content:
                self.json(described(bucket, name))
            else:
                content = objects[bucket, name]
                first = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers.get("Range", "bytes=0-")))
                content_range = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.answer(206 if first else 200, {"Content-Range": content_range}, content[first:])

        def do_POST(self):
            self.whole_body()
            bucket = self.path.split("/")[5]
            if bucket == "gone":
                self.answer(404)
                return
            name = parse_qs(urlsplit(self.path).query)["name"][0]
            session = f"/upload/session/{len(uploads)}"
            uploads[session] = (bucket, name, bytearray())
            self.answer(200, {"Location": f"http://{self.headers['Host']}{session}"})

        def do_PUT(self):
            body = self.whole_body()
            bucket, name, received = uploads[urlsplit(self.path).path]
            span, total = re.fullmatch(r"bytes (.*)/(.*)", self.headers["Content-Range"]).groups()
            if span != "*":
                received[int(span.split("-")[0]) :] = body
            if total != "*" and len(received) == int(total):
                objects[bucket, name] = bytes(received)
                self.json(described(bucket, name))
            else:
                self.answer(308, {"Range": f"bytes=0-{len(received) - 1}"} if received else {})

        def do_DELETE(self):
            name = unquote(urlsplit(self.path).path.split("/")[6])
            found = objects.pop((self.path.split("/")[4], name), None)
            self.answer(404 if found is None else 204)

        def json(self, document):
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    return Google
