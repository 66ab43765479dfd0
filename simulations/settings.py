"""What `meduet-simulate` is told besides the plan: engine, device, where the run goes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from forms.form import build
from forms.names import Phrase
from forms.ranges import Entries, Range, Share
from meduet_models.tokenizer.tokenizer import TokenizerSpec
from simulations.generation.settings import GenerationSettings
from simulations.hospitals.plans import HospitalsPlan, hospitals_plan
from simulations.tracking import Tool


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the sites' work is run."""

    kind: Literal["process", "ray"]
    """`process`: in this process and those that it starts (`workers`). `ray`: Flower's simulation."""
    address: str | None = None
    """host:port of a Ray cluster that runs already; none starts one on this machine."""
    cpus_per_site: Annotated[int, Range(at_least=1, at_most=1024)] = 1
    """Cores that a site's work takes; both engines train with as many threads, on which the bits depend."""
    workers: Literal["auto"] | Annotated[int, Range(at_least=1, at_most=1024)] = "auto"
    """`process`: processes among which the sites are dealt, at most one per site; the bits are the same
    whatever their number. 1: the run's own. `auto`: as many as there are cores for, one more where the sites
    do not divide evenly among them; 1 on a GPU."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.kind == "ray" and self.workers != "auto":
            raise ValueError("engine.workers has no effect with engine=ray: set engine.cpus_per_site.")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the observer measures."""

    every_rounds: Annotated[int, Range(at_least=1, at_most=100_000)] = 2
    """Rounds between probes; the last round is always probed."""
    thorough: bool = False
    """Whether the final model is measured as for a table: nested cross-validation, permutation null, anatomy;
    about 15 seconds per hospital's model."""


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What every simulated hospital has in its site.yaml."""

    modality_names: Annotated[dict[str, Phrase], Entries(1000)]
    """A hospital's name of a modality to the plan's."""
    patient_pattern: str
    """Regular expression searched in a scan's path; group 1 is the patient. Empty: told from the layout."""
    split_fractions: Annotated[tuple[float, float, float], Share]
    """Share of the patients for training, validation and test."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What the centre keeps of its rounds."""

    keep_early: bool = False
    """Whether the checkpoints of the start and the middle of the run stay beside the last three: an audit
    calibrates by them."""


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """A run of several hospitals on one machine."""

    engine: EngineSettings
    """How the sites' work is run."""
    evaluation: EvaluationSettings
    """What the observer measures."""
    checkpoints: CheckpointSettings
    """What the centre keeps of its rounds."""
    generation: GenerationSettings | None
    """How much is sampled and measured of a diffusion model; none: nothing."""
    site: SiteSettings
    """What every hospital has in its site.yaml."""
    held_out: tuple[str, ...]
    """Hospitals that take no part in the plan: made, and opened for evaluation only."""
    tokenizer: TokenizerSpec
    """The frozen VAE of all sites."""
    anatomy: str | None
    """File of the plan's start from public anatomy; none: the shipped one."""
    folder: str
    """Where the run goes."""
    fresh: bool
    """Whether a run that is already there is removed first."""
    device: Literal["auto", "cpu", "cuda"]
    """Device of every site."""
    compile: bool
    """Whether sites compile the network."""
    tracking: tuple[Tool, ...]
    """For which tools the rounds' numbers are also written, in the run's folder `tracking`."""

    @property
    def anatomy_path(self) -> Path | None:
        """Where `anatomy` lies, if it is not the shipped one."""
        return None if self.anatomy is None else Path(self.anatomy)


def settings_from(config: Mapping[str, Any]) -> tuple[SimulationSettings, HospitalsPlan]:
    """The settings, and where the scans come from; raises `ValueError` naming what is wrong."""
    hospitals = config["hospitals"]
    if config["root"] is not None and hospitals["kind"] == "phantoms":
        raise ValueError(
            "root has no effect with hospitals=phantoms: use hospitals=folders or hospitals=split."
        )
    if config["generation"] is not None and config["diffusion"] is None:
        raise ValueError("generation has no effect without a diffusion model: set generation=none.")
    names = [field.name for field in dataclasses.fields(SimulationSettings)]
    settings = build(SimulationSettings, {name: config[name] for name in names}, "settings")
    return settings, hospitals_plan(hospitals)
