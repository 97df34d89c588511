"""Tic-tac-toe for rayrl: the model plays X, its opponent's strength is config.

`rayrl_tictactoe.board` is plain Python without rayrl and can be imported by itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .env import Game, tictactoe

__all__ = ["Game", "tictactoe"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing `rayrl_tictactoe.board` does not pull in rayrl.
    if name in __all__:
        from . import env

        return getattr(env, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
