"""Model cards, and uploading to a stand-in of the hub's HTTP interface."""

import base64
import http.server
import json
import logging
import sys
import threading

import pytest

from vit_jax.weights.hub import model_card, push
from vit_jax.weights.trained import create_model, load

TOKEN = "hf_secret"
DESCRIPTION = {"model": {"variant": "ViT-B/16"}, "num_classes": 5, "image_size": [32, 48]}


def front_matter(card):
    """Reads the YAML, of which every value is JSON."""
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    pairs = (line.split(": ", 1) for line in front.splitlines())
    return {name: json.loads(value) for name, value in pairs}


def test_cards():
    given = {"license": "mit", "datasets": ["imagenet-1k"], "metrics": ["accuracy"]}
    card = model_card(DESCRIPTION, "hugging_face", **given)
    assert front_matter(card) == {
        **given,
        "tags": ["image-classification", "vit_jax"],
        "pipeline_tag": "image-classification",
        "library_name": "transformers",
    }
    assert "# ViT-B/16" in card and "32x48 pixels: 5 classes" in card
    noted = {**DESCRIPTION, "num_classes": 0, "notes": ["licence: DINOv3 License, https://x", "y"]}
    found = front_matter(model_card(noted, "timm"))
    assert (found["license"], found["license_name"]) == ("other", "DINOv3 License")
    assert found["library_name"] == "timm" and "datasets" not in found
    assert found["pipeline_tag"] == "image-feature-extraction"
    noted["notes"] = ["licence: Apache-2.0"]
    assert front_matter(model_card(noted, "timm"))["license"] == "apache-2.0"
    assert "license" not in front_matter(model_card(DESCRIPTION, "timm"))  # nothing is invented


@pytest.mark.parametrize("format", ["timm", "hugging_face"])
def test_saved_folders_have_a_card(tmp_path, format):
    model = create_model("ViT-mu/8", 3, 16, mlp="gelu")
    model.save(tmp_path / "saved", format)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= names
    assert front_matter((tmp_path / "saved" / "README.md").read_text())["tags"]
    assert load(tmp_path / "saved").num_classes == 3


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes a repository's creation and a commit of small files; `server.status` refuses."""

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server.asked.append((self.path, self.headers["Authorization"]))
        answer = {"url": f"{server.url}/me/model"}
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            answer = {"files": modes}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    server.received[line["value"]["path"]] = content
            answer = {"commitUrl": f"{server.url}/me/model/commit/1", "commitOid": "1"}
        self.reply(server.status, answer)

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.reply(200, {"id": "me/model", "sha": "1", "siblings": []})

    def reply(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.received, server.status = [], {}, 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


def test_uploading(stand_in, tmp_path, caplog, capfd):
    model = create_model("ViT-mu/8", 3, 16, mlp="gelu")
    with caplog.at_level(logging.DEBUG):
        address = model.push_to_hub("me/model", license="apache-2.0", datasets=["digits"])
    assert address == f"{stand_in.url}/me/model"
    assert {f"Bearer {TOKEN}"} == {token for path, token in stand_in.asked if "me/model" in path}
    for name, content in stand_in.received.items():
        (tmp_path / name).write_bytes(content)
    assert {"README.md", "config.json", "model.safetensors"} == stand_in.received.keys()
    assert front_matter((tmp_path / "README.md").read_text())["datasets"] == ["digits"]
    assert load(tmp_path).num_parameters == model.num_parameters

    stand_in.status = 403
    with pytest.raises(ConnectionError, match=r"me/model was not uploaded: .*403") as refused:
        model.push_to_hub("me/model")
    said = [caplog.text, str(refused.value), *capfd.readouterr()]
    assert not [text for text in said if TOKEN in text]


def test_what_is_said_before_anything_is_sent(monkeypatch):
    with pytest.raises(ValueError, match="repository 'model': expected owner/name"):
        push("model", None, DESCRIPTION, "timm")
    with pytest.raises(ValueError, match="unknown format of the hub 'npz'"):
        create_model("ViT-mu/8", 3, 16).push_to_hub("me/model", "npz")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        push("me/model", None, DESCRIPTION, "timm")
