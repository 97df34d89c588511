"""Sanitize text from models, servers and files before printing it to a terminal."""

from __future__ import annotations

__all__ = ["visible"]

# C0 as Unicode control pictures; DEL and C1 (some of which start escape sequences) and lone
# surrogates, which cannot be printed, as Python escapes
_REPLACEMENTS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)}
    | {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
)


def visible(text: str) -> str:
    """Replace the control characters in `text`, except newlines and tabs, by visible ones.

    Untrusted text must not move the cursor, set the title or fill the clipboard.
    """
    return text if text.isprintable() else text.translate(_REPLACEMENTS)
