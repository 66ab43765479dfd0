"""A plan as the centre publishes it: what will run, under which hash, in which code.

One JSON file, `<hash>.plan.json`, that the centre sends to every site. A fine-tuning is published together
with its run's plan, under its own hash. What this file does not do: it approves nothing
(`client/consent/approvals.py`).
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from federation.exchanges.finetuning import FinetunePlan, check_sees_volumes
from federation.plan.plan import RunPlan
from forms.form import build, check
from forms.json_text import read_json
from forms.names import Sha256
from forms.ranges import shown

_FIELDS = frozenset({"bundle_sha256", "finetuning", "plan", "sha256"})


@dataclass(frozen=True, kw_only=True)
class PublishedPlan:
    """What sites are asked to approve."""

    plan: RunPlan
    """The run; of a fine-tuning, the run that pretrained the encoder."""
    bundle_sha256: Sha256
    """Hash of the code (`federation/bundle.py`)."""
    finetuning: FinetunePlan | None = None
    """The fine-tuning that is asked for; none: the run itself is."""

    def __post_init__(self) -> None:
        """Refuse what does not belong together."""
        check(self, "published")
        if self.finetuning is not None and self.finetuning.run_sha256 != self.plan.sha256:
            raise ValueError("Expected a fine-tuning of the plan that is published with it; it is another's.")
        if self.finetuning is not None:
            check_sees_volumes(self.finetuning.local, self.plan)

    @property
    def sha256(self) -> str:
        """What is approved: hash of the fine-tuning if there is one, else of the plan."""
        return self.plan.sha256 if self.finetuning is None else self.finetuning.sha256

    @property
    def file_name(self) -> str:
        """`<hash>.plan.json`."""
        return f"{self.sha256}.plan.json"

    def to_json(self) -> str:
        """The file's text."""
        finetuning = None if self.finetuning is None else dataclasses.asdict(self.finetuning)
        values = {
            "sha256": self.sha256,
            "bundle_sha256": self.bundle_sha256,
            "plan": dataclasses.asdict(self.plan),
            "finetuning": finetuning,
        }
        return json.dumps(values, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "PublishedPlan":
        """Back from `to_json`; raises `ValueError`, also when the hash in the file is not the plan's."""
        values = read_json(text, "a published plan")
        if not isinstance(values, dict) or set(values) != _FIELDS:
            raise ValueError(
                f"Expected a published plan with {', '.join(sorted(_FIELDS))}; got another file."
            )
        finetuning, bundle = values["finetuning"], values["bundle_sha256"]
        if not isinstance(bundle, str):
            raise ValueError(f"Expected bundle_sha256 to be a hash; got {shown(bundle)}.")
        published = PublishedPlan(
            plan=build(RunPlan, values["plan"]),
            bundle_sha256=bundle,
            finetuning=None if finetuning is None else build(FinetunePlan, finetuning, "finetuning"),
        )
        if values["sha256"] != published.sha256:
            raise ValueError(
                f"Expected a plan of hash {str(values['sha256'])[:12]}, as the file says; it has "
                f"{published.sha256[:12]}. It was edited: ask the centre for it again."
            )
        return published


def plan_of(text: str) -> RunPlan:
    """The run's plan from either kind of file: a published plan, or a plan's own JSON; raises
    `ValueError`."""
    values: Any = read_json(text, "a plan")
    if isinstance(values, dict) and "bundle_sha256" in values:
        return PublishedPlan.from_json(text).plan
    return RunPlan.from_json(text)
