"""An offline W&B run that was gone on with is one run once `wandb sync` has uploaded both parts: against a server of ours."""

import gzip
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qdm_lightning.loggers import opened, wandb_logger

pytestmark = pytest.mark.extras


class Server(BaseHTTPRequestHandler):
    """What `wandb sync` needs of W&B: runs are made where they are not there, and rows land at the offset that is asked for."""

    histories: dict[str, list[dict]] = {}  # noqa: RUF012 - one server a test

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        if self.path.startswith("/graphql"):
            asked = json.loads(raw)
            self.answer({"data": self.graphql(asked["query"], asked.get("variables") or {})})
            return
        if "file_stream" in self.path:
            history = self.histories[self.path.split("/")[-2]]
            rows = json.loads(raw).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            if rows["content"]:
                history[rows["offset"] :] = map(json.loads, rows["content"])
        self.answer({"exitcode": None, "limits": {}})

    do_PUT = do_POST

    def graphql(self, query, given):
        name = given.get("name")
        project = {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "me"}}
        if "UpsertBucket" in query:
            new = name not in self.histories
            rows = len(self.histories.setdefault(name, []))
            bucket = {"id": "Ug==", "name": name, "displayName": name, "historyLineCount": rows, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"http://{self.headers['Host']}/file"} for file in given["files"]]
            return {"createRunFiles": {"runID": "Ug==", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            rows = self.histories.get(name)
            count = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(rows or [])}
            tails = {"historyTail": json.dumps((rows or [])[-1:]), "eventsTail": "[]", "config": "{}", "summaryMetrics": "{}"}
            bucket = {"id": "Ug==", "name": name, "displayName": name, "tags": [], "wandbConfig": '{"t": 1}', **count, **tails}
            return {"model": {**project, "bucket": bucket if rows else None}}
        return {}

    def answer(self, data):
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_both_parts_are_one_run(tmp_path):
    for first in (0, 3):
        with opened([partial(wandb_logger, mode="offline")], run_dir=tmp_path / "run", config={}) as [logger]:
            for step in range(first, first + 3):
                logger.log_metrics({"x": step}, step)
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        there = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40}
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"} | there
        command = [sys.executable, "-m", "wandb", "sync", *map(str, parts)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    [(name, rows)] = Server.histories.items()
    assert name == (tmp_path / "run" / "wandb_id").read_text().strip()
    assert [row["x"] for row in rows] == list(range(6))
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
