"""A taskset with a tool, an MCP server that is started once for all tasks."""

from collections.abc import Iterator

import verifiers.v1 as vf

PRICES = {"tea": 3, "rice": 2, "milk": 4}


class Prices(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    TOOL_PREFIX = "shop"

    @vf.tool
    async def price(self, item: str) -> str:
        """The price of an item.

        Args:
            item: what is bought.
        """
        return str(PRICES[item])


class ItemData(vf.TaskData):
    answer: int


class Item(vf.Task[ItemData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.answer))

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))


class Shop(vf.Taskset[Item, vf.TasksetConfig]):
    @classmethod
    def toolsets(cls, config: vf.TasksetConfig) -> list[vf.Toolset]:
        return [Prices(vf.SharedToolsetConfig())]

    def load(self) -> Iterator[Item]:
        for k, (item, price) in enumerate(PRICES.items()):
            data = ItemData(idx=k, prompt=f"How much is {item}?", answer=price)
            yield Item(data, self.config.task)


__all__ = ["Shop"]

if __name__ == "__main__":
    Prices.run()
