"""An error as the API tells it, whichever way the API was asked."""

from __future__ import annotations

from typing import Any

from formation.core.errors import FormationError

HTTP_STATUS = {
    "usage": 400,
    "denied": 403,
    "not_found": 404,
    "conflict": 409,
    "unavailable": 503,
    "quorum": 503,
    "host": 500,
    "failed": 500,
}


def error_json(error: FormationError) -> dict[str, Any]:
    """An error as the API tells it."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
