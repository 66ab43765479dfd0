"""What an audit looks at: scans as an attacker may hold them, what left, the books, and published models.

Whoever opens a run, a site or a centre fills this in; the attacks read nothing else. Everything that left is
here as it left: its hash is that of the journal's line, else it is not here (`missing` says why).

What this file does not do: read a file.

Axes: n, m = scans, c d h w = latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from audit.codes import KnownCodes
from audit.cohort import Cohort
from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.tokenizer.tokenizer import Tokenizer
from privacy.ledger import Ceiling


@dataclass(frozen=True)
class Release:
    """One answer that left a site."""

    site: str
    record: Mapping[str, Any]
    """The line of the site's journal."""
    tensors: Mapping[str, Tensor] | None
    """What left; None where it is not at hand."""
    missing: str = ""
    """Why it is not."""
    rows: tuple[int, ...] = ()
    """Of released latents: which scan of the cohort each is; of a round: whose scans its steps drew."""

    @property
    def kind(self) -> str:
        """Kind of release."""
        return str(self.record.get("kind", "?"))

    @property
    def round(self) -> int:
        """Round of the plan."""
        return int(self.record.get("round", 0))

    @property
    def artefact(self) -> str:
        """As the report calls it."""
        return f"{self.site}: {self.kind}"


@dataclass(frozen=True)
class SiteBooks:
    """Where the books of a site lie."""

    journal: Path
    ledger: Path
    ceiling: Ceiling | None = None
    """The most that the site's settings allow; None: not known."""


@dataclass(frozen=True)
class Shadow:
    """A model that was retrained in the run's place."""

    network: FactorNetwork
    trained_on: Mapping[str, frozenset[str]]
    """Patients of each site whom it was trained on."""


@dataclass(frozen=True)
class Labelled:
    """Candidates of a site whose answers are known, as a reader may know them."""

    cohort: Cohort
    seen: tuple[Tensor, ...]
    """What a downstream network is shown of each scan: latents, a volume, or both."""
    answers: Tensor
    """What is to be predicted of each, as the task reads it."""


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning with labels, as the centre has it."""

    plan: FinetunePlan
    labelled: Mapping[str, Labelled]
    """By site; who took part is whose labels were used."""
    network_after: Callable[[int], nn.Module | None]
    """The network after so many rounds; 0: as it was sent first. None: it is not kept."""
    sha256: str = ""
    """Of the file of its final weights; empty before the end."""


@dataclass(frozen=True)
class Evidence:
    """All of it."""

    name: str
    """What the report calls the run."""
    plan: RunPlan
    books: Mapping[str, SiteBooks]
    releases: Sequence[Release]
    cohorts: Mapping[str, Cohort]
    hashes: Mapping[str, str]
    """sha256 of every file that the report speaks of, by name."""
    network_of: Callable[[Release], FactorNetwork | None] = lambda release: None
    """The weights under which a release was computed, as the centre knows them; None: it does not."""
    before_after: Callable[[Release], tuple[FactorNetwork, FactorNetwork] | None] = lambda release: None
    """Of a round: the network that was sent, and the same with the site's mean update; of one that left
    masked, with the mean of all sites."""
    question_of: Callable[[Release], Mapping[str, Tensor] | None] = lambda release: None
    """Public scans and bank of styles that came with the question of moments; None: not at hand."""
    codes: KnownCodes = field(default_factory=KnownCodes)
    """Content of candidates that was computed already."""
    model: FactorNetwork | None = None
    """The published model."""
    earlier: Mapping[str, FactorNetwork] = field(default_factory=dict)
    """Models of earlier rounds, by what the report calls them; the common start among them."""
    shadows: Sequence[Shadow] = ()
    """Models retrained on other halves of the patients."""
    diffusion: GenerativeModel | None = None
    """The published diffusion model."""
    coins: Mapping[str, Mapping[str, Sequence[bool]]] = field(default_factory=dict)
    """Of each site, by kind of canary, whose coin came up: what an attacker has to guess."""
    transformers_of: Callable[[Release], tuple[DiffusionTransformer, DiffusionTransformer] | None] = (
        lambda release: None
    )
    """Of a round of a federated diffusion model: the transformer that was sent, and the same with the site's
    mean update."""
    finetunings: Mapping[str, Finetuning] = field(default_factory=dict)
    """By the hash of its plan."""
    public: Float[Tensor, "m c d h w"] | None = None
    """The public scans of a plan with privacy."""
    tokenizer: Tokenizer | None = None
    """Whose decoder turns latents into scans."""
    acquired_again: Callable[[str], Float[Tensor, "n c d h w"] | None] = lambda site: None
    """Latents of the same scans of a site, acquired again: shifted, other gamma, noise."""
    no_weights: str = ""
    """Why `network_of` may know none, in a sentence."""
    unfinished: str = ""
    """What is missing of the run, in a sentence; empty: it is finished."""
