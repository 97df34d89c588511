"""Two agents: one guesses a number, the other one answers, whom nobody trains but we."""

from collections.abc import Iterator

import verifiers.v1 as vf


class Number(vf.TaskData):
    number: int


class Duel(vf.Task[Number, vf.State, vf.TaskConfig]):
    @vf.reward
    async def found(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.number))


class Numbers(vf.Taskset[Duel, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[Duel]:
        number = 0
        while True:
            number = (7 * number + 3) % 5
            yield Duel(Number(number=number, prompt="Guess my number."), self.config.task)


class DuelConfig(vf.EnvConfig):
    guesser: vf.AgentConfig = vf.AgentConfig(harness={"id": "talk"}, max_turns=4)
    answerer: vf.AgentConfig = vf.AgentConfig(harness={"id": "talk"})
    hint: str = "Think."


class DuelEnv(vf.Env[DuelConfig]):
    async def run(self, task: Duel, agents: vf.Agents) -> None:
        other = vf.Task(vf.TaskData(prompt=None, system_prompt=f"It is {task.data.number}."))
        async with (
            agents.guesser.interaction(task) as guesser,
            agents.answerer.interaction(other) as answerer,
        ):
            guess = await guesser.turn()
            while not guess.terminated:
                answer = await answerer.turn(f"Is it {guess.last_reply}?")
                if answer.last_reply == "yes":
                    break
                guess = await guesser.turn(f"{answer.last_reply}. {self.config.hint}")

    async def finalize(self, task: Duel, episode: vf.Episode) -> None:
        (answerer,) = [one for one in episode.traces if one.agent.name == "answerer"]
        answerer.record_reward("patience", answerer.num_turns, 0.1)


__all__ = ["DuelEnv", "Numbers"]
