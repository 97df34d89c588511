"""OpenAI's error objects and their HTTP statuses."""

from __future__ import annotations

from rayrl.chat.requests import ApiError
from rayrl.errors import ConfigError, InfraError

__all__ = ["as_api_error"]


def as_api_error(error: Exception) -> ApiError:
    """Convert any exception to an error response."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):  # the engine or the template rejects this request
        return ApiError(400, str(error))
    if isinstance(error, InfraError):
        return ApiError(503, str(error), code="engine_unavailable", retry_after=1)
    return ApiError(500, f"The server failed: {type(error).__name__}.", code="internal_error")
