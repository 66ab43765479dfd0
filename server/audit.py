"""The centre's part of an audit: the models of a run as the centre knows them.

The centre is the attacker whom an audit assumes: it has the weights before and after each round that is kept,
and the code with which it asked. A style branch that stays at the sites is as it started.

What this file does not do: attack (`audit/`), or hold a scan.
"""

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from audit.evidence import Release
from federation.exchanges.diffusion import transformer_of
from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.downstream.starting import StartedNetwork, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork, MeDUET
from meduet_models.published.pretrained import MODEL
from meduet_models.weights import load_weights, sha256_of_file
from server.checkpoints import Checkpoint, Checkpoints
from server.exchanges.finetuning import FINETUNED
from server.model import MeduetModel

AGREED = "finetuning.json"
"""What a folder of a fine-tuning is of."""
Network = TypeVar("Network", bound=nn.Module)


class CentresModels:
    """The models in the folder of a run. Raises `ValueError` for a damaged checkpoint."""

    def __init__(self, plan: RunPlan, folder: Path) -> None:
        checkpoints = Checkpoints(folder / "checkpoints", plan.sha256)
        self.plan, self._folder = plan, folder
        self.kept: dict[int, Checkpoint] = {r: checkpoints.load(r) for r in checkpoints.rounds()}
        self._model = MeduetModel(plan)
        self._coded: dict[int, FactorNetwork] = {}
        path = folder / MODEL
        self._final = load_weights(path)[0] if path.is_file() else {}

    @cached_property
    def final(self) -> FactorNetwork | None:
        """The published model; None before the end."""
        return self._network(self._final) if self._final else None

    def earlier(self) -> dict[str, FactorNetwork]:
        """The common start on the final latent scale, the model of the middle round where it was kept, and
        that of the last but one."""
        if not self._final:
            return {}
        constants = {n: self._final[n] for n in ("latent_mean", "latent_deviation")}
        models = {"the common start": self._network(constants)}  # a U-Net's start adds nothing to it yet
        last = self.plan.num_rounds
        for early in sorted({last // 2, last - 1} & set(self.kept) - {0, last}):
            models[f"round {early}"] = self._network(self.kept[early].shared)
        return models

    def asked_with(self, release: Release) -> FactorNetwork | None:
        """The weights that came with a question; None where they are not kept."""
        last = self.plan.num_rounds
        if release.kind == "audit_counts" or (release.kind == "probe" and release.round == last + 1):
            return self.final
        checkpoint = self.kept.get(release.round)
        if checkpoint is None:
            return None
        if checkpoint.round not in self._coded:
            coded = self._model.with_code(checkpoint.shared, checkpoint.bank)
            self._coded[checkpoint.round] = self._network(coded)
        return self._coded[checkpoint.round]

    def transformers_of(self, release: Release) -> tuple[DiffusionTransformer, DiffusionTransformer] | None:
        """The transformer that was sent for a round of the federated diffusion model, and the same moved by a
        site's mean update; None where it is not kept."""
        sent, update = self._diffusion.get(release.round - 1), release.tensors
        if self.final is None or sent is None or update is None or not set(update) <= set(sent.shared):
            return None
        weight = float(release.record["weight"])
        moved = {n: t + update[n] / weight if n in update else t for n, t in sent.shared.items()}
        start = transformer_of(self.plan, self.final)
        return _loaded(start, sent.shared), _loaded(start, moved)

    @cached_property
    def _diffusion(self) -> dict[int, Checkpoint]:
        checkpoints = Checkpoints(self._folder / "diffusion" / "checkpoints", self.plan.sha256)
        return {r: checkpoints.load(r) for r in checkpoints.rounds()}

    def before_after(self, release: Release) -> tuple[FactorNetwork, FactorNetwork] | None:
        """The model that was sent for a round, and the same moved by a site's mean update; of a round that
        left masked, the model after it, which all sites moved."""
        sent, update = self.kept.get(release.round - 1), release.tensors
        if sent is not None and "masked" in release.record:
            after = self.kept.get(release.round)
            return None if after is None else (self._network(sent.shared), self._network(after.shared))
        if sent is None or update is None or not set(update) <= set(sent.shared):
            return None
        weight = float(release.record["weight"])
        moved = {n: t + update[n] / weight if n in update else t for n, t in sent.shared.items()}
        return self._network(sent.home | sent.shared), self._network(sent.home | moved)

    def _network(self, shared: Mapping[str, Tensor]) -> FactorNetwork:
        network = MeDUET(self.plan.network, len(self.plan.sites), seed=self.plan.seed)
        own = network.state_dict()
        network.load_state_dict(own | {n: t for n, t in shared.items() if n in own})
        return network.eval().requires_grad_(False)


class CentresFinetuning:
    """A fine-tuning in a folder, as the centre has it. Raises `ValueError` for another folder, or a damaged
    checkpoint."""

    def __init__(self, folder: Path, pretrained: FactorNetwork) -> None:
        self.plan = FinetunePlan.from_json((folder / AGREED).read_text(encoding="utf-8"))
        self._pretrained, path = pretrained, folder / FINETUNED
        self._kept = Checkpoints(folder / "checkpoints", self.plan.sha256)
        self.sha256 = sha256_of_file(path) if path.is_file() else ""

    def network_after(self, rounds: int) -> StartedNetwork | None:
        """The network after so many rounds; 0: as it was sent first. None: it is not kept."""
        if rounds and rounds not in self._kept.rounds():
            return None
        plan, local = self.plan, self.plan.local
        network = starting_network(
            task_of(local.task),
            local.network,
            self._pretrained,
            local.classes,
            trainable=local.encoder == "finetuned",
            seed=plan.seed,
            anatomy_start=plan.anatomy_start,
        )
        return _loaded(network, self._kept.load(rounds).shared if rounds else {})


def _loaded(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """A copy with these of its weights."""
    own = copy.deepcopy(network)
    own.load_state_dict({**own.state_dict(), **weights})
    return own.eval()
