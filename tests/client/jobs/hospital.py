"""A hospital with five scans in files, opened from its site.yaml as a deployment does, with or without a
launcher; and the questions of a plan of seconds."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from flwr.app import ArrayRecord, Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.secrets.site_secret import DRAWS
from client.settings import load_site_config
from client.site import Site
from client.site_scans import confirm_patients
from client.watchdog import Watch, unwatched
from federation.exchanges.pretraining import PRETRAINING, TrainAsk
from federation.exchanges.survey import SURVEY, SurveyAsk
from federation.journal import Journal
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from storage.files import private_folder

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "meduet_models" / "tokenizer" / "tokenizer_8ch.safetensors"
ROUTES = {SurveyAsk: SURVEY.route, TrainAsk: PRETRAINING.route}


@dataclass
class World:
    """Scans that are encoded once, and the plan that they are encoded for."""

    folder: Path
    plan: RunPlan
    bank: dict[str, torch.Tensor]

    def hospital(self, name: str, *launcher: str, **settings: Any) -> "HospitalFiles":
        """A hospital with books and states of its own; scans, encodings and secret are everybody's."""
        folder = private_folder(self.folder / name)
        values = {
            "name": "north",
            "data_root": str(self.folder / "scans"),
            "state_dir": "state",
            "cache_dir": str(self.folder / "cache"),
            "minimum_cohort": 2,
            "allow_non_private": True,
            "plan_approval": "implied",
            "split_fractions": [1.0, 0.0, 0.0],
            "tokenizer": {"kind": "file", "path": str(TOKENIZER), "channels": 8},
            "device": "cpu",
            "threads": 1,
            "launcher": list(launcher),
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(values | settings))
        made = HospitalFiles(folder)
        state = private_folder(made.site().state_dir)
        if not (state / DRAWS).exists():
            (state / DRAWS).write_bytes(bytes(range(32)))
        confirm_patients(made.site().config)
        return made

    def survey(self) -> SurveyAsk:
        return SurveyAsk(plan_json=self.plan.to_json())

    def round(self, number: int = 1) -> TrainAsk:
        model = MeDUET(self.plan.network, len(self.plan.sites), seed=self.plan.seed)
        named, scope, method = model.state_dict(), self.plan.style.head, self.plan.aggregation.method
        return TrainAsk(
            plan_json=self.plan.to_json(),
            round=number,
            shared={name: named[name] for name in shared_keys(model, scope, method)},
            bank=self.bank,
            home={name: named[name] for name in home_keys(model, scope, method)} if number == 1 else None,
        )


@dataclass
class HospitalFiles:
    """A hospital on disk: opened anew for every question."""

    folder: Path

    def site(self) -> Site:
        return Site(load_site_config(self.folder / "site.yaml"))

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def answer(self, ask: Ask, watch: Watch = unwatched, on_step: Any = None) -> RecordDict:
        app = make_client_app(
            lambda context: self.site(), on_step or (lambda site, step, loss: None), watch=watch
        )
        return send(app, ROUTES[type(ask)], ask.to_record())

    def log(self) -> str:
        path = self.state_dir / "site.log"
        return path.read_text() if path.is_file() else ""

    def journal(self) -> list[dict[str, Any]]:
        """The lines of the journal, but for what another moment or file would change."""
        lines = [entry.record for entry in Journal(self.state_dir / "journal.jsonl").entries()]
        for line in lines:
            for of_this_ledger in ("ledger", "reserved"):
                line.pop(of_this_ledger, None)
            line.get("metrics", {}).pop("seconds", None)
        return lines

    def states(self) -> dict[str, bytes]:
        """States of rounds, as they lie there."""
        return {p.name: p.read_bytes() for p in sorted((self.state_dir / "state").rglob("*.safetensors"))}


def send(app: ClientApp, route: str, content: RecordDict) -> RecordDict:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    metadata = Metadata(1, "id", 1, 2, "", "", time.time(), 60.0, route)
    return app(Message(content=content, metadata=metadata), context).content


def bits(reply: RecordDict) -> dict[str, Any]:
    """All that a reply holds, but for how long it took."""
    return {
        name: [(key, array.data) for key, array in part.items()]
        if isinstance(part, ArrayRecord)
        else {key: value for key, value in part.items() if key != "seconds"}
        for name, part in reply.items()
    }


def write_scans(folder: Path) -> None:
    folder.mkdir()
    for number in range(5):
        array = np.random.default_rng(number).random((14, 20, 15)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"p{number}.nii.gz")
