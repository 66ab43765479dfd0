"""Flower's FedAvg, as it comes, on the whole float32 network of a FedMeDUET plan; it only looks at the clock.

Run configuration: `plan` and `folder`, paths on this machine. Leaves `rounds.json` in the folder: begin and
end of each round, what crossed, what the sites said of their seconds.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from meduet_models.meduet import MeDUET, NetworkConfig
from storage.files import write_whole

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes when a round begins and ends, and how much crossed."""

    def __init__(self, num_sites: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=num_sites, min_available_nodes=num_sites)
        self.rounds: list[dict[str, Any]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's, after a look at the clock."""
        self.rounds.append({"round": server_round, "begin": time.time(), "down": arrays.count_bytes()})
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's, then a look at the clock."""
        replies = list(replies)
        sites = [
            {"seconds": reply.content["metrics"]["seconds"], "up": reply.content["arrays"].count_bytes()}
            for reply in replies
            if reply.has_content()
        ]
        aggregated = super().aggregate_train(server_round, replies)
        self.rounds[-1] |= {"sites": sites, "end": time.time()}
        return aggregated


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the plan."""
    plan = json.loads(Path(str(context.run_config["plan"])).read_text("utf-8"))
    folder = Path(str(context.run_config["folder"]))
    network = {name: tuple(v) if isinstance(v, list) else v for name, v in plan["network"].items()}
    weights = MeDUET(NetworkConfig(**network), len(plan["sites"]), seed=plan["seed"]).state_dict()
    strategy = TimedFedAvg(len(plan["sites"]))
    train_config = ConfigRecord({"network": json.dumps(network), "num_sites": len(plan["sites"])})
    strategy.start(
        grid, ArrayRecord(weights), num_rounds=plan["training"]["rounds"], train_config=train_config
    )
    write_whole(folder / "rounds.json", json.dumps(strategy.rounds))
