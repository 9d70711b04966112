"""Structured logs on stderr: one event with keys and values a line, for people on a terminal, as JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


def set_up_logs(*, level: str, form: str, stream: TextIO | None = None) -> None:
    """Configure structlog and, for libraries, the standard logger.

    Must run before libp2p is imported: that import sets up loggers of its own.

    Args:
      level: debug, info, warning or error.
      form: `console`, `json`, or `auto` (console on a terminal).
    """
    out = stream or sys.stderr
    number = getattr(logging, level.upper())
    logging.basicConfig(stream=out, level=max(number, logging.WARNING), format="%(levelname)s %(name)s %(message)s", force=True)
    for noisy in ("httpx", "httpcore", "hypercorn", "hypercorn.error", "hypercorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    on_terminal = out.isatty()
    as_json = form == "json" or (form == "auto" and not on_terminal)
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer(sort_keys=False) if as_json else structlog.dev.ConsoleRenderer(colors=on_terminal)
    )
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        # The console renderer draws tracebacks itself; in JSON they must become a field of the line.
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
