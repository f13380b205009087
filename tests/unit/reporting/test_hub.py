"""A student's folder for the hub, its card, and its way to a server that speaks the hub's protocol, and back."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DDPMPipeline

from qdm_lightning import SamplerConfig, draw_images, load_student
from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.command_line import command_of
from qdm_lightning.publish import Publish, PublishConfig, show
from qdm_lightning.quantization import timesteps
from qdm_lightning.reporting.hub import check_repo, make_folder, read_run, upload
from qdm_lightning.reporting.model_card import Publication
from qdm_lightning.runs.folder import read_config

REPO, COMMIT = "me/qdm-tiny", "a" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository: made, filled by one commit of whole files, read back."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state = self.server.state
        state["tokens"].add(self.headers.get("Authorization"))
        if state["refuse"]:
            return self.answer({"error": "no"}, 403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            state["private"] = asked.get("private") is True or asked.get("visibility") == "private"
            return self.answer({"url": f"{state['url']}/{REPO}", "name": REPO, "id": REPO})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert self.path == f"/api/models/{REPO}/commit/main", self.path
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                state["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{state['url']}/{REPO}/commit/{COMMIT}"})

    def do_GET(self):
        state = self.server.state
        name = self.path.partition(f"/{REPO}/resolve/{COMMIT}/")[2]
        if name:
            headers = {"ETag": f'"{hash(name):x}"', "X-Repo-Commit": COMMIT}
            return self.send(state["files"][name], headers=headers)
        if "/tree/" in self.path:
            files = state["files"].items()
            return self.answer([{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files])
        siblings = [{"rfilename": file} for file in state["files"]]
        private = state["private"] and not state["public"]
        return self.answer({"id": REPO, "sha": COMMIT, "private": private, "siblings": siblings, "tags": [], "downloads": 0})

    do_HEAD = do_GET

    def answer(self, data, status=200):
        self.send(json.dumps(data).encode(), status)

    def send(self, body, status=200, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"url": url, "files": {}, "tokens": set(), "refuse": False, "private": False, "public": False}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server.state
    server.shutdown()
    server.server_close()


def published(run, **settings):
    shown = []
    command = Publish("publish", (), lambda result, settings: shown.append(result))
    command.work((PublishConfig(run=str(run), **settings), command_of(read_config(run))), Path())
    return shown[0]


def estimate(student):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), timesteps(torch.tensor([1, 500])):
        return student(x, torch.tensor([1, 500])).sample


def test_there_and_back(tiny_run, tmp_path, hub):
    made = published(tiny_run, repo=REPO, private=True, license="cc-by-4.0", out=str(tmp_path / "out"))
    assert made.url == f"{hub['url']}/{REPO}"
    assert hub["private"]
    assert hub["tokens"] == {"Bearer hf_secret"}
    assert set(hub["files"]) == set(made.files)
    assert hub["files"]["samples.png"] == (tiny_run / "samples.png").read_bytes()
    assert {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"} < set(made.files)
    back = huggingface_hub.snapshot_download(REPO, endpoint=hub["url"], cache_dir=tmp_path / "cache")
    assert torch.equal(estimate(load_student(back)), estimate(load_student(tiny_run)))
    pipeline = DDPMPipeline.from_pretrained(back)  # as the card says
    assert torch.equal(estimate(pipeline.unet), estimate(load_student(tiny_run)))


def test_the_card_says_what_the_records_say(tiny_run, tmp_path):
    made = published(tiny_run, out=str(tmp_path / "out"))
    assert made.url is None
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    head = yaml.safe_load(front)
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    scores = {score["type"]: score["value"] for score in head["model-index"][0]["results"][0]["metrics"]}
    assert scores["fd_digits"] == pytest.approx(metrics["student"]["fd_digits"], rel=1e-6)
    assert (head["library_name"], "license" in head) == ("diffusers", False)
    assert "w4a4" in head["tags"]
    cost = metrics["student"]["cost"]
    for said in (f"{cost['bytes']:,}", f"{cost['speedup']['linear']:.2f}", "64 images, ddim-4", "No licence was chosen"):
        assert said in text
    assert f"| {metrics['floor_at_size']['fd_digits']:.4g} |" in text
    assert "![" in text
    assert str(tiny_run) not in card
    card = huggingface_hub.ModelCard(card)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == scores
    assert 'DDPMPipeline.from_pretrained("THIS_FOLDER")' in text
    code = text.split("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", str(tmp_path / "out"))
    scope = {}
    exec(code, scope)
    expected = draw_images(load_student(tiny_run), range(16), SamplerConfig(steps=4, batch_size=16))
    assert torch.equal(scope["images"], expected)


def test_the_command_makes_the_same_configuration(tiny_run, composed):
    import shlex

    from qdm_lightning.cli.command_line import _comparable
    from qdm_lightning.cli.schema import plain

    words = shlex.split(command_of(read_config(tiny_run)))[3:]
    assert _comparable(plain(composed(*words))) == _comparable(read_config(tiny_run))
    other = plain(
        composed("quant=w3a3", "taq=off", "nem/weighting=propagation", "quant.rules={mid_block.*:4}", "tags=[a b]", "seed=3")
    )
    words = shlex.split(command_of(other))[3:]
    assert {"quant=w3a3", "taq=off", "nem/weighting=propagation", "quant.rules={mid_block.*:4}", "seed=3"} <= set(words)
    assert _comparable(plain(composed(*words))) == _comparable(other)


def test_places_are_nobodys_business(composed, tmp_path):
    from qdm_lightning.cli.schema import plain

    (tmp_path / "secret").mkdir()
    other = plain(composed("data=images", f"data.path={tmp_path / 'secret'}", "data.image_size=16", "model=unet_small"))
    command = command_of(other)
    assert "data.path=PATH" in command
    assert "secret" not in command
    hub_id = plain(composed("data=hf", "data.path=uoft-cs/cifar10", "data.image_size=16", "model=unet_small"))
    assert "data.path=uoft-cs/cifar10" in command_of(hub_id)


def test_dry_run_uploads_nothing(tiny_run, tmp_path, hub, capsys):
    made = published(tiny_run, repo=REPO, dry_run=True, out=str(tmp_path / "out"))
    show(made, PublishConfig(run=str(tiny_run), repo=REPO, dry_run=True))
    assert hub["tokens"] == set()
    out = capsys.readouterr().out
    assert "nothing was uploaded" in out
    assert "unet/config.json" in out


def about():
    return Publication(name="x", repo=None, command="train")


def test_what_is_not_published(run_copy, tmp_path, hub, monkeypatch):
    hub["refuse"] = True
    make_folder(read_run(run_copy), tmp_path / "out", about())
    with pytest.raises(UserError, match=r"the hub refuses repo=me/qdm-tiny: .*403.*; the folder is ") as error:
        upload(tmp_path / "out", REPO, False, "x")
    assert "\n" not in str(error.value)
    hub.update(refuse=False, public=True)
    with pytest.raises(UserError, match=r"repo=me/qdm-tiny is there already and is public"):
        upload(tmp_path / "out", REPO, True, "x")
    assert hub["files"] == {}
    with pytest.raises(UserError, match=r"repo=a/b/c is no name of a repository"):
        check_repo("a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(UserError, match=r"the hub has no token of yours: type hf auth login, or set HF_TOKEN"):
        check_repo(REPO)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("valuable")
    with pytest.raises(UserError, match="holds something else than a published student"):
        make_folder(read_run(run_copy), tmp_path / "other", about())
    metrics = json.loads((run_copy / "metrics.json").read_text())
    (run_copy / "metrics.json").write_text(
        json.dumps({**metrics, "student": {**metrics["student"], "image_mse": float("nan")}})
    )
    with pytest.raises(UserError, match=r"is not published: its student.image_mse is nan"):
        read_run(run_copy)
    (run_copy / "metrics.json").write_text(json.dumps({**metrics, "student": {}}))
    with pytest.raises(UserError, match="has no student, it is a teacher alone"):
        read_run(run_copy)
    (run_copy / "metrics.json").write_text(json.dumps(metrics))
    shutil.rmtree(run_copy / "student")
    with pytest.raises(UserError, match="has no student folder of this version"):
        read_run(run_copy)
    (run_copy / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"is not finished: python -m qdm_lightning.train run="):
        read_run(run_copy)


def test_a_hub_that_is_not_there(run_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    make_folder(read_run(run_copy), tmp_path / "out", about())
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached: "):
        upload(tmp_path / "out", REPO, False, "x")
