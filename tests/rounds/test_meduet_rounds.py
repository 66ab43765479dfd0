"""The real client and the real network, over latents in memory: nothing is a stand-in but the scans."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from client.app import make_client_app
from federation.journal import Journal
from federation.keys.certificates import public_key_of, read_certificate
from federation.plan.plan import RunPlan, TrainingPlan
from meduet_models.meduet import MeDUET
from meduet_models.weights import load_weights
from privacy.clipping import joint_norm
from server.app import run
from server.consortium.provisioning import ConsortiumSettings, Office, SiteEntry, provision
from server.server_app import app
from simulations.engines.in_process import InProcessGrid
from strategies.streaming_grid import StreamingGrid
from tests.worlds import Hospital, Latents


class Killed(BaseException):
    """As if the process had ended."""


def federation(plan: RunPlan, folder: Path, steps: Callable[[], None] = lambda: None) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.participants[index]
        held = range(len(plan.sites)) if name == "pooled" else [index]
        return Hospital(folder / "sites" / name, Latents(list(held)), name)

    client = make_client_app(open_site, on_step=lambda site, step, loss: steps())
    return InProcessGrid(client, len(plan.participants), through_wire=True)


def small(miniature: Any, **settings: Any) -> RunPlan:
    plan: RunPlan = miniature.plan(deadline_s=300.0, **settings)
    training = TrainingPlan(rounds=2, steps_per_round=2, batch_size=4, warmup=0.0)
    return dataclasses.replace(plan, training=training)


@pytest.mark.parametrize("method", ["content_share", "pooled", "alone"])
def test_a_whole_run_of_the_real_client_and_network(miniature: Any, tmp_path: Path, method: str) -> None:
    plan = small(miniature, method=method)
    result = run(federation(plan, tmp_path), plan, tmp_path)
    rounds = result.metrics["rounds"]
    assert [list(entry["sites"]) for entry in rounds] == [list(plan.participants)] * 2
    assert not any(entry["refused"] for entry in rounds)
    assert all(math.isfinite(value) for entry in rounds for value in entry["loss"].values())
    assert rounds[0]["loss"]["total"] > 0
    if method == "alone":
        assert result.model is None
        return
    weights, provenance = load_weights(tmp_path / "model.safetensors")
    start = MeDUET(plan.network, 3, seed=plan.seed).state_dict()
    assert provenance["rounds"] == "2" and set(weights) <= set(start)
    assert not torch.equal(weights["embed.weight"], start["embed.weight"])
    assert not torch.equal(weights["latent_mean"], start["latent_mean"])
    assert ("style_head" in {name.split(".")[0] for name in weights}) == (method != "content_share")
    erased = not torch.equal(weights["erasure_matrix"], start["erasure_matrix"])
    assert erased == (method != "pooled")


def test_a_run_killed_within_a_step_ends_in_the_same_bits(miniature: Any, tmp_path: Path) -> None:
    plan = small(miniature)
    whole = run(federation(plan, tmp_path / "whole"), plan, tmp_path / "whole").shared
    taken = 0

    def dies() -> None:
        nonlocal taken
        taken += 1
        if taken == 8:  # round 2, the first site's second step
            raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(federation(plan, folder, dies), plan, folder)
    resumed = run(federation(plan, folder), plan, folder).shared
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_in_mxint8_a_run_takes_fewer_bytes_and_both_sides_hash_the_same(
    miniature: Any, tmp_path: Path
) -> None:
    sizes, shared = [], []
    for wire_dtype in ("float32", "mxint8"):
        plan, folder = small(miniature), tmp_path / wire_dtype
        plan = dataclasses.replace(plan, release=dataclasses.replace(plan.release, wire_dtype=wire_dtype))
        result = run(federation(plan, folder), plan, folder)
        (last,) = [entry for entry in result.metrics["rounds"] if entry["round"] == 2]
        sizes.append([(s["bytes_down"], s["bytes_up"]) for s in last["sites"].values()])
        shared.append(dict(result.shared))
        centre = [entry.record for entry in Journal(folder / "journal.jsonl").entries()]
        arrived = {(r["site"], r["round"]): r["sha256"] for r in centre if r.get("to") == "train.round"}
        for site in plan.participants:
            own = [entry.record for entry in Journal(folder / "sites" / site / "journal.jsonl").entries()]
            left = {(site, r["round"]): r["sha256"] for r in own if r["kind"] == "round"}
            assert len(left) == 2 and left.items() <= arrived.items()
    for (down, up), (whole_down, whole_up) in zip(sizes[1], sizes[0], strict=True):
        assert down < 0.5 * whole_down and up < 0.5 * whole_up  # a network of a few thousand weights
    for final in shared:  # axes of the code may turn with any change of the content
        for name in ("places", "channels", "mean", "matrix"):
            del final[f"code_{name}"]
    apart = joint_norm({name: shared[1][name] - tensor for name, tensor in shared[0].items()})
    assert 0 < apart < 0.02 * joint_norm(shared[0])


def test_sites_of_too_few_patients_for_sums_end_nobodys_run(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Hospital.__init__

    def without_consent(self: Hospital, folder: Path, name: str, scans: Latents) -> None:
        made(self, folder, name, scans)
        self.exact_sums, self.launcher = False, None

    monkeypatch.setattr(Hospital, "__init__", without_consent)
    plan = small(miniature)
    result = run(federation(plan, tmp_path), plan, tmp_path)
    erasure = result.metrics["erasure"]
    assert erasure["refused"] == {site: "refused: too_few_for_sums" for site in plan.participants}
    assert "0 of 3 sites told their sums" in erasure["skipped"] and erasure["rank"] == 0
    assert torch.equal(result.shared["erasure_matrix"], torch.eye(len(result.shared["erasure_matrix"])))
    assert result.model is not None and result.model.is_file()
    again = run(federation(plan, tmp_path), plan, tmp_path)
    assert again.metrics["erasure"] == erasure


def test_a_site_that_missed_the_first_rounds_joins_in_later(miniature: Any, tmp_path: Path) -> None:
    class Missing(InProcessGrid):
        """The last site is lost in round 1."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            (identity,) = message_ids
            asked = self._waiting[identity]
            first = asked.metadata.message_type == "train.round" and asked.metadata.group_id == "1"
            if not first or asked.metadata.dst_node_id != max(self.get_node_ids()):
                return super().pull_messages([identity])
            del self._waiting[identity]
            return [Message(Error(code=5, reason="Node Unavailable"), reply_to=asked)]

    plan = small(miniature, quorum=0.6)
    plan = dataclasses.replace(plan, training=dataclasses.replace(plan.training, rounds=4))
    whole = federation(plan, tmp_path)
    grid = Missing(whole._client_app, len(plan.participants))
    metrics = run(grid, plan, tmp_path / "run").metrics
    last = plan.participants[-1]
    assert [entry["refused"] for entry in metrics["rounds"]] == [
        {last: "Flower error 5"},
        {},  # it never received the start, says so, and is asked again with it in the same round
        {},
        {},
    ]
    assert set(metrics["rounds"][1]["sites"]) == set(plan.participants)
    own = metrics["rounds"][3]["sites"]
    assert own[last]["bytes_down"] == own[plan.participants[0]]["bytes_down"]


class Keyed(StreamingGrid):
    """A grid whose nodes are registered with their sites' keys, as SuperLink's are."""

    def __init__(self, inner: Grid, office: Office, sites: Sequence[str]) -> None:
        super().__init__(inner)
        self._certificates = [office.folder / "sites" / site / "site.pem" for site in sites]

    def get_nodes(self) -> Iterable[NodeInfo]:
        for node, path in zip(self.get_node_ids(), self._certificates, strict=True):
            key = public_key_of(read_certificate(path.read_bytes()))
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            yield NodeInfo(node_id=node, public_key=pem)


def deployment(**run_config: str) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))


def test_the_server_app_runs_the_plan_that_its_run_configuration_names(
    miniature: Any, tmp_path: Path
) -> None:
    plan = small(miniature, method="pooled")
    (tmp_path / "agreed.json").write_text(plan.to_json())
    settings = ConsortiumSettings(name="tiny", server="localhost:1", sites=(SiteEntry(name="pooled"),))
    office = provision(settings, tmp_path / "office").office
    context = deployment(
        plan=str(tmp_path / "agreed.json"), folder=str(tmp_path / "run"), consortium=str(office.folder)
    )
    app(grid=Keyed(federation(plan, tmp_path / "run"), office, plan.participants), context=context)
    assert load_weights(tmp_path / "run" / "model.safetensors")[1]["plan_sha256"] == plan.sha256


@pytest.mark.parametrize("missing", ["plan", "folder", "consortium"])
def test_a_run_configuration_without_plan_folder_or_consortium_is_refused(
    miniature: Any, tmp_path: Path, missing: str
) -> None:
    plan = small(miniature)
    configuration = {"plan": str(tmp_path / "p"), "folder": str(tmp_path), "consortium": str(tmp_path)} | {
        missing: ""
    }
    with pytest.raises(ValueError, match=f"{missing}="):
        app(grid=federation(plan, tmp_path), context=deployment(**configuration))
