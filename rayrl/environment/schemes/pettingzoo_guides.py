"""What PettingZoo's classic games do not say of themselves: rules, and names of actions and moves.

Their observations are arrays of numbers, whose meaning only their documentation tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Guide", "guide_of"]


@dataclass(frozen=True)
class Guide:
    """How to show a game.

    Attributes:
        rules, actions, planes: defaults of the settings with these names.
        moves: the legal actions by name, for games with too many to name them beforehand.
        text: what an agent is shown instead of its observation.
    """

    rules: str = ""
    actions: tuple[str, ...] = ()
    planes: tuple[int, ...] = ()
    moves: Callable[[Any], dict[str, int]] | None = None
    text: Callable[[Any, Any], str] | None = None


def guide_of(game: str) -> Guide:
    """The guide to a game of PettingZoo's registry, by its ID; an empty one to others."""
    return _GUIDES.get(game.rpartition("-v")[0], _NONE)


def _chess_moves(world: Any) -> dict[str, int]:
    from pettingzoo.classic.chess import chess_utils

    game = world.unwrapped
    player = game.possible_agents.index(world.agent_selection)
    legal = chess_utils.legal_moves(game.board)
    return {
        chess_utils.action_to_move(game.board, action, player).uci(): action for action in legal
    }


def _hanabi_moves(world: Any) -> dict[str, int]:
    state = world.unwrapped.hanabi_env.game_state
    return {
        state.action_to_string(state.current_player(), action).strip("()"): action
        for action in state.legal_actions()
    }


def _hanabi_text(world: Any, agent: Any) -> str:
    game = world.unwrapped
    text: str = game.hanabi_env.game_state.observation_string(game.possible_agents.index(agent))
    return text.strip()


_MARKS = "In the board, 0 marks your {0}, 1 your opponent's, . none."
_CARDS = "0 to 12 are spades, ace, two to king; 13 to 25 hearts, 26 to 38 diamonds, 39 to 51 clubs"
_NONE = Guide()
_GUIDES = {
    "classic/chess": Guide(
        "Chess. White, in capitals, is player_0. A move is where a piece stands and where it goes, "
        "as e2e4; a promoted pawn becomes the letter behind it.",
        moves=_chess_moves,
    ),
    "classic/connect_four": Guide(
        "Connect Four: an action is the column in which your piece falls, 0 on the left. "
        + _MARKS.format("pieces")
    ),
    "classic/go": Guide(
        "Go. Rows and columns count from 0 at the top left; the action of a point is its row times "
        "the number of columns, plus its column. The last action passes. "
        + _MARKS.format("stones"),
        planes=(0, 1),
    ),
    "classic/hanabi": Guide(
        "Hanabi: together, build a firework of each colour, from 1 upwards. You do not see your "
        "own cards, which are shown as XX with what you were told of them.",
        moves=_hanabi_moves,
        text=_hanabi_text,
    ),
    "classic/leduc_holdem": Guide(
        "Leduc Hold'em, poker with two jacks, queens and kings. 0, 1 or 2 says that you hold a "
        "jack, queen or king; 3, 4 or 5 that this is the public card. 6 to 20 count your chips in "
        "the pot, from none, 21 to 35 your opponent's.",
        ("call", "raise", "fold", "check"),
    ),
    "classic/rps": Guide(
        "Rock, paper, scissors: 0 is rock, 1 paper, 2 scissors. You are shown your opponent's last "
        "action; at first, a number that is no action."
    ),
    "classic/texas_holdem": Guide(
        f"Texas Hold'em with limits. Your cards and the public ones: {_CARDS}. 52 to 56 count the "
        "raises in the first round, from none, 57 to 61 in the second, 62 to 66 in the third, 67 "
        "to 71 in the fourth.",
        ("call", "raise", "fold", "check"),
    ),
    "classic/texas_holdem_no_limit": Guide(
        f"Texas Hold'em without limits. Your cards and the public ones: {_CARDS}. At 52 are your "
        "chips in the pot, at 53 the most chips that anybody has there.",
        ("fold", "check or call", "raise half the pot", "raise the pot", "all in"),
    ),
    "classic/tictactoe": Guide(
        "Tic-tac-toe: squares are numbered 0 to 8, row by row. " + _MARKS.format("squares")
    ),
}
