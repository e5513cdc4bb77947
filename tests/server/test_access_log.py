"""What is written of each request."""

from __future__ import annotations

import json
import logging

import pytest

from spallm_serve.server.access_log import LOGGER, log_request, write_access_log
from tests.server.test_gate import DIGEST, World


def test_a_line_is_written_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    with caplog.at_level("INFO", logger=LOGGER):
        world.chat(model="support")
        world.chat(model="nothing")
        world.ask(None, "GET", "/v1/models")
        world.ask(None, "GET", "/livez")
    served, unknown, stranger = [vars(record) for record in caplog.records]
    assert served["status"] == 200
    assert (served["tenant"], served["adapter"]) == ("acme", f"acme/support@{DIGEST}")
    assert (served["prompt_tokens"], served["completion_tokens"]) == (5, 7)
    assert served["request_id"].startswith("req-")
    assert (unknown["status"], unknown["code"]) == (404, "model_not_found")
    assert (stranger["status"], stranger["path"]) == (401, "/v1/models")
    assert "tenant" not in stranger
    assert "acme-key" not in caplog.text


def test_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(LOGGER)
    before = logger.handlers, logger.propagate, logger.level
    try:
        write_access_log()
        log_request({"status": 200, "tenant": 'a"b'})
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["status"], line["tenant"]) == ("request", 200, 'a"b')
    assert line["timestamp"]
