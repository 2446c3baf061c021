"""Pages of the report, and the scripts in them that touch no page, run by Node.js."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

NODE = shutil.which("node") or shutil.which("nodejs")
HARNESS = """
const vm = require("vm");
const { source, name, calls } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const api = vm.runInThisContext(`${source}; ${name}`);
Promise.all(calls.map((call) => vm.runInThisContext(`(${call[0]})`)(api, ...call.slice(1))))
  .then((results) => console.log(JSON.stringify(results)));
"""


def run_script(name, script, *calls):
    """Call functions of (api, ...arguments) on what a script of the page defines; return their results."""
    source = (files("pipeline.report") / "templates" / script).read_text(encoding="utf-8")
    done = subprocess.run(
        [NODE, "-e", HARNESS],
        input=json.dumps({"source": source, "name": name, "calls": calls}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Page(HTMLParser):
    """A page's elements with their attributes, and the text in each kind of element."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.texts = html, [], []
        self._open = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def having(self, name):
        return [attributes for _, attributes in self.elements if name in attributes]

    @property
    def cards(self):
        return [attributes for tag, attributes in self.elements if attributes.get("class") == "card"]
