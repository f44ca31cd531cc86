"""A server that speaks the file protocol of the Hugging Face Hub, and a network of a few kilobytes."""

import hashlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import torch
from torch import nn

from rt_detectron.checkpoint.architectures import ARCHITECTURES, TORCHVISION, Architecture

COMMIT = "3f04ac96136001cfe402022100728124cbe3fac5"  # the revision that the zoo's table pins
WEB_PAGE = b"<!DOCTYPE html><html>sign in</html>"


@dataclass
class Hub:
    """What the server serves and how; it looks at each request, so a test may change this at any time.

    Attributes:
        files: content by path, "OWNER/REPOSITORY/FILE".
        announced: ETags by path that replace the SHA-256.
        damage: what happens to a body on its way.
        status: instead of an answer.
        web_page: every answer is a web page, as from a hotel's network.
        delay: seconds before a body.
        downloads: the paths whose bodies were sent.
    """

    url: str = ""
    files: dict = field(default_factory=dict)
    announced: dict = field(default_factory=dict)
    damage: object = None
    status: int = 200
    web_page: bool = False
    delay: float = 0
    downloads: list = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        hub = self.server.hub
        if hub.web_page:
            return self.send({"Content-Length": len(WEB_PAGE)}, WEB_PAGE if body else b"")
        if hub.status != 200:
            return self.send({"Content-Length": 0}, status=hub.status)
        if self.path.startswith("/storage/"):
            return self.answer_storage(self.path.removeprefix("/storage/"), body)
        owner, repository, resolve, revision, file = self.path.lstrip("/").split("/")
        assert (resolve, revision) == ("resolve", COMMIT)
        path = f"{owner}/{repository}/{file}"
        if path not in hub.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT, "Content-Length": 0}
            return self.send(headers, status=404)
        content = hub.files[path]
        self.send(
            {
                # As the Hub does, to another host, from which on its own headers are missing.
                "Location": f"http://localhost:{self.server.server_port}/storage/{path}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hub.announced.get(path, hashlib.sha256(content).hexdigest())}"',
                "X-Linked-Size": len(content),
                "Content-Length": 0,
            },
            status=302,
        )

    def answer_storage(self, path: str, body: bool):
        hub = self.server.hub
        content = hub.files[path]
        if body:
            hub.downloads.append(path)
            time.sleep(hub.delay)
            content = hub.damage(content) if hub.damage else content
        self.send({"Content-Length": len(content), "ETag": '"storage"'}, content if body else b"")

    def send(self, headers: dict, body: bytes = b"", status: int = 200):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A :class:`Hub` that runs, and is the Hub for this process and those it starts; its cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "*")
    # huggingface_hub reads its environment when it is imported, which has happened here.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server.hub.url)
    template = f"{server.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


class TinyNet(nn.Module):
    """Five strides and a linear layer, in 20 kilobytes."""

    def __init__(self, num_classes: int = 5):
        super().__init__()
        channels = (3, 8, 8, 8, 16, 16)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(channels)
            )
        )
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch):
    """``tiny(seed, num_classes)``: a :class:`TinyNet` with BN statistics; the table knows it as "tiny"."""
    stages = ("stem", "res2", "res3", "res4", "res5")
    taps = {stage: f"features.{number}" for number, stage in enumerate(stages)}
    architecture = Architecture("tiny", TORCHVISION, TinyNet, "features.0.0", "fc.", taps=taps)
    monkeypatch.setitem(ARCHITECTURES, "tiny", architecture)

    def build(seed: int = 0, num_classes: int = 5) -> TinyNet:
        generator = torch.Generator().manual_seed(seed)
        network = TinyNet(num_classes).eval()
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                scale = (2 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                offset = 1 if name.endswith(("running_var", "1.weight")) else 0
                tensor.copy_(offset + scale * torch.randn(tensor.shape, generator=generator))
        return network

    return build
