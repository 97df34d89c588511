"""Text of models, servers and files on its way to a terminal."""

from __future__ import annotations

__all__ = ["visible"]

# C0 as Unicode's pictures of them, DEL and C1 (one of which begins escape sequences, too) as Python
# writes them; a lone surrogate cannot be printed at all
_SHOWN = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)}
    | {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
)


def visible(text: str) -> str:
    """`text` with its control characters made visible, but for newlines and tabs.

    What others wrote must not move the cursor, set the title or fill the clipboard.
    """
    return text if text.isprintable() else text.translate(_SHOWN)
