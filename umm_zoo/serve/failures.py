"""Errors as OpenAI's API says them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from umm_zoo.errors import UserError, printable

#: Types of errors by status, where OpenAI has no other.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line.
        param: the parameter that it is about.
        code: a word that programs can ask for.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.message, self.param = printable(message), None if param is None else printable(param)

    @classmethod
    def of(cls, error: BaseException, status: int = 400) -> ApiError:
        """What is said of an error: a user's in its own words, with this ``status``; a bug in none that tell of this machine."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, UserError):
            param = error.problems[0].where if error.problems else ""
            error.file = ""  # the place of the run is nobody's business
            return cls(status, "; ".join(error.lines()), param or None)
        return cls(500, "an error inside the server, whose log says more", code="internal_error")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def missing_model(name: object) -> ApiError:
    """The error of a name that is not the run's."""
    return ApiError(404, f"The model '{str(name)[:100]}' does not exist.", "model", "model_not_found")
