"""Load a learner's state as tensors and plain data only: no file of a checkpoint can run code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rayrl.errors import DataError

__all__ = ["read_state"]


def read_state(
    file: str | Path, map_location: Any = "cpu", known: Sequence[type[Any]] = ()
) -> dict[str, Any]:
    """Load what `torch.save` wrote.

    Args:
        file: of a checkpoint.
        map_location: as `torch.load`'s.
        known: classes it may hold besides tensors and plain data.

    Raises:
        DataError: it is damaged, or names something else to be imported.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            state: dict[str, Any] = torch.load(file, map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants to import {foreign[1]}" if foreign else repr(error)[:200]
        raise DataError(
            f"{file}: not a state that a learner saved ({why}). Remove the checkpoint it belongs "
            "to, and the run goes on from the one before."
        ) from error
    return state
