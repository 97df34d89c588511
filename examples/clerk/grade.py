"""The score of the clerk's answers."""

import json

__all__ = ["grade"]


def grade(output: str) -> float:
    """1 for the right number after a call of the tool; 0.2 for a call alone."""
    result = json.loads(output)
    if not result["calls"]:
        return 0.0
    return 1.0 if str(result["right"]) in result["said"] else 0.2
