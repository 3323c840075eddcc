"""Sets of shards for tests: made by the command in this process, served over HTTP, and looked at byte by byte."""

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from bridle_hf.common.arguments import parse_command_line
from bridle_hf.data.shards import writer as shard
from bridle_hf.data.shards.arguments import ShardArguments


def make_shards(data: str | Path, out: Path, *options: str) -> str:
    """`out` with the shards of `data`; raises what the command raises."""
    words = ["--data", str(data), "--output_dir", str(out), *options]
    shard.make_shards(*parse_command_line(ShardArguments, argv=words, takes_recipe=False))
    return str(out)


def digest(media: str | bytes) -> int:
    """A number that stands for the bytes."""
    media = Path(media).read_bytes() if isinstance(media, str) else media
    return int.from_bytes(hashlib.sha256(media).digest()[:7])


def load_digest(sample, rng) -> dict[str, torch.Tensor]:
    """Stands in for a loader: what the sample's bytes are."""
    return {"digest": torch.tensor(digest(sample.media()))}


def digests(samples) -> list[int]:
    """Of all samples, sorted."""
    return sorted(digest(sample.media()) for sample in samples)


class _Handler(SimpleHTTPRequestHandler):
    """Python's own: it knows no byte ranges."""

    asked: list[str] = []
    redirects = False

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def send_head(self):
        if not self.redirects or "?" in self.path:
            return super().send_head()
        self.send_response(302)
        self.send_header("Location", f"{self.path}?signature={uuid.uuid4()}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, *args):
        pass


@contextmanager
def served(folder: str | Path, redirects: bool = False) -> Iterator[tuple[str, list[str]]]:
    """The folder's URL, and the paths that were asked for with GET; perhaps each with a redirection, new each time."""
    _Handler.asked, _Handler.redirects = [], redirects
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", _Handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
