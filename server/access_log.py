"""One line of JSON for each request, on standard error."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

LOGGER = "spallm.access"


def write_access_log() -> None:
    """Have the lines written from now on; other loggers are left as they are."""
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter("%(message)s", timestamp=True, rename_fields={"message": "event"})
    )
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def log_request(facts: dict[str, object]) -> None:
    """A request is over.

    Args:
        facts: of it; nothing of prompts, answers or keys.
    """
    logging.getLogger(LOGGER).info("request", extra=facts)
