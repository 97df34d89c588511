"""OpenAI's error objects and their HTTP statuses."""

from __future__ import annotations

from typing import Any

from rayrl.errors import ConfigError, InfraError, clip

__all__ = ["ApiError", "as_api_error"]

_TYPES = {401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """An error response to a request.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; clipped, because it may quote the request.
        param: the field of the body, e.g. `messages[0].content`.
        code: machine-readable code, e.g. `context_length_exceeded`.
        retry_after: seconds after which to retry; 0 for none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(clip(message, 2_000))
        self.status, self.message, self.code = status, str(self), code
        self.param = param and clip(param, 200)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def as_api_error(error: Exception) -> ApiError:
    """Convert any exception to an error response."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):  # the engine or the template rejects this request
        return ApiError(400, str(error))
    if isinstance(error, InfraError):
        return ApiError(503, str(error), code="engine_unavailable", retry_after=1)
    return ApiError(500, f"The server failed: {type(error).__name__}.", code="internal_error")
