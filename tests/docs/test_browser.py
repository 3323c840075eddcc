"""The documentation site in a headless chromium: pages, pictures, navigation and search, without a failed request."""

import json
import queue
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.site import ROOT, build_site


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ["index.html", "how.html", "guide.html", "cost.html", "api/models.html", "api/embeddings.html"]
PAGES += [f"tutorials/{path.stem}.html" for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
]


class Site(SimpleHTTPRequestHandler):
    """Serves the site and the page that drives it, whose report comes to `server.reports`; `server.refused` lists what
    was asked for and is not there."""

    def do_GET(self):
        if self.path != "/drive.html":
            return super().do_GET()
        page = (Path(__file__).parent / "drive.html").read_text(encoding="utf-8")
        content = page.replace("PAGES", json.dumps(PAGES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        self.server.reports.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def send_error(self, code, *args, **kwargs):
        self.server.refused.append((code, self.path))
        super().send_error(code, *args, **kwargs)

    def log_message(self, *args):
        pass


def test_a_reader_finds_the_way(tmp_path):
    build_site(tmp_path / "site")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path / "site")))
    server.refused, server.reports = [], queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--enable-logging=stderr", "--remote-debugging-port=0", "--window-size=1400,1100", f"{here}drive.html",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            seen = json.loads(server.reports.get(timeout=300))
        finally:
            browser.terminate()
            server.shutdown()
            server.server_close()
    assert "error" not in seen, seen["error"]
    for name, page in seen["pages"].items():
        assert page["title"].strip() and not page["broken"] and page["wider"] <= 0, f"{name}: {page}"
        assert page.get("narrow", 0) <= 0, f"{name} is wider than a telephone by {page['narrow']} pixels"
        assert page["styled"] == "sticky", f"{name} has no style"
    assert set(PAGES) <= seen["pages"].keys()
    ways = {name: page["title"] for name, page in seen["pages"].items() if name not in PAGES}
    assert ways == {
        "start": "bridle_hf", "tab": "Models", "neighbour": "Processors", "back": "Models", "result": "Processors",
    }  # fmt: skip
    assert seen["requests"] and all(request.startswith((here, "data:")) for request in seen["requests"])
    assert not server.refused
    assert not re.findall(r".*CONSOLE.*(?:Uncaught|ERR_|Failed).*", (tmp_path / "log").read_text())
