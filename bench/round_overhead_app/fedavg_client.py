"""A site of Flower's FedAvg: loads the whole network, changes every weight a little, sends all of it back.

Nothing is learned, nothing is read from disk and nothing kept: the least that a site can do. Every value
changes, because Flower sends equal arrays once only.
"""

import json
import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from meduet_models.meduet import MeDUET, NetworkConfig

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round."""
    torch.set_num_threads(1)
    config = message.content["config"]
    network = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(config["network"]).items()}
    model = MeDUET(NetworkConfig(**network), config["num_sites"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    began = time.perf_counter()
    draws = torch.Generator().manual_seed(context.node_id % 2**31 + config["server-round"])
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.add_(torch.randn(weight.shape, generator=draws), alpha=1e-3)
    metrics = MetricRecord({"num-examples": 8, "seconds": time.perf_counter() - began})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
