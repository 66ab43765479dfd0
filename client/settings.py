"""A site's settings: the hospital's half of a run, `site.yaml`, and what follows from it alone.

Folders, device, smallest cohort, consent: they never leave. The other half, `federation/plan/plan.py`, is the
same everywhere; the stricter of the two wins. Does not do: open a book or a scan (`client/site.py`,
`client/site_scans.py`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from client.consent.approvals import AllowedHours, Approvals
from client.consent.approvers import ApprovalRule
from client.consent.exact_sums import check_sentence as check_exact_sums
from client.scans.layouts import LayoutRules
from federation.keys.key_files import read_text
from federation.plan.release_policy import check_sentence
from forms.form import build, check
from forms.names import Phrase, SiteName
from forms.paths import path_from, resolve_paths
from forms.ranges import Entries, Range, Share, shown
from forms.yaml_text import read_yaml
from meduet_models.tokenizer.tokenizer import TokenizerSpec
from privacy.accounting import LARGEST_DELTA
from privacy.ledger import Ceiling

DeviceChoice = Literal["auto", "cpu", "cuda"]
PATHS = ("data_root", "state_dir", "cache_dir", "cache_key_file", "keys_dir", "processes_dir")
PROCESSES = "processes"
"""Settings of a site that are paths; and the folder of what connects it, in its state."""


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """What is in `site.yaml`. Relative paths there start at the file's own folder."""

    name: SiteName
    """Name of the site, as the plan lists it."""
    data_root: Path
    """Folder of scans, or a manifest. Only ever read."""
    state_dir: Path
    """Folder for everything this site writes: cache, ledger, journal, tables, log. Not inside `data_root`."""
    cache_dir: Path | None = None
    """Folder of the encodings, which may outlive the state and serve several of them; none: `cache` in
    `state_dir`. Not inside `data_root`."""
    encrypt_cache: bool = False
    """Whether what is derived from scans lies encrypted in the cache (AES-256-GCM); `meduet-site cache-key`
    changes its key."""
    cache_key_file: Path | None = None
    """File that opens the cache's key, made when there is none; keep it on another disk. None: a passphrase
    does, which the commands ask for and programs read from MEDUET_CACHE_PASSPHRASE."""
    layout: Literal["auto", "bids", "plain", "manifest", "dicom"] = "auto"
    """How the data folder is laid out; `auto` tells from what is there."""
    modality_names: Annotated[dict[str, Phrase], Entries(1000)] = field(default_factory=dict)
    """This site's name of a modality to the plan's; `*` for scans whose modality nothing says."""
    patient_pattern: str = ""
    """Regular expression searched in a scan's path below the data folder, in every layout; group 1 is the
    patient. Empty: told by the rule that `meduet-site check` shows."""
    label_pattern: str = LayoutRules.label_pattern
    """Regular expression for what a label's name adds to its image's."""
    follow_links: bool = False
    """Whether links that lead out of the data folder, and links to folders, are followed."""
    split_fractions: Annotated[tuple[float, float, float], Share] = (0.8, 0.1, 0.1)
    """Share of the patients for training, validation and test."""
    split_salt: str = "1"
    """Any text; another text draws another split. Changed within a run, it trains on held-out patients."""
    minimum_cohort: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 10
    """Fewest patients whose statistics may leave together; the plan may ask for more, never for fewer."""
    allow_non_private: bool = False
    """This site agrees that bounded sums without differential privacy leave it. Without this consent it takes
    part only in plans whose every release is noised, within `epsilon_ceiling`."""
    epsilon_ceiling: Annotated[float, Range(at_least=0, at_most=100)] = 0.0
    """The most epsilon that a patient of this site may be charged over all plans together; 0: nothing leaves,
    unless `allow_non_private`."""
    delta_ceiling: Annotated[float, Range(above=0, at_most=LARGEST_DELTA)] = LARGEST_DELTA
    """At which delta the charges are added up."""
    latent_release: str = ""
    """Agreement that latents leave, as the full sentence of `client/exchanges/latents.py`; empty: no latents
    leave, and no plan that asks for them is accepted."""
    allow_exact_sums: str = ""
    """Agreement that sums of products over few patients leave, as the full sentence of
    `client/consent/exact_sums.py`; empty: they leave only above ten times as many patients as numbers."""
    plan_approval: Literal["required", "implied"] = "required"
    """`required`: a plan runs here only after `meduet-site plan approve`, in the code it was approved with;
    `implied`: any plan that lists this site (simulated hospitals). Other code than what is installed here
    runs in neither case."""
    approvals: ApprovalRule = field(default_factory=ApprovalRule)
    """How many people must approve a plan, each with a key of her own."""
    allowed_hours: str = ""
    """Hours in which an answer may begin, local time ("18:00-06:00"); empty: always."""
    keys_dir: Path | None = None
    """Folder of keys and certificates that `meduet-site install` wrote; none: this site does not connect."""
    processes_dir: Path | None = None
    """Folder of what connects this site, and its logs; none: `processes` in `state_dir`. A hospital that
    takes part at two centres has a site.yaml for each, with one `state_dir` and two of these folders."""
    launcher: Annotated[tuple[str, ...], Entries(100)] = ()
    """Command that runs a script and waits for its end ([sbatch, --wait, --gres=gpu:1]): the work of each
    answer is done by such a job. Empty: where `meduet-site start` runs."""
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    """Which tokenizer; its hash must be the plan's."""
    device: DeviceChoice = "auto"
    """Where scans are encoded and the network is trained; `auto` takes a GPU if there is one."""
    threads: Annotated[int, Range(at_least=0, at_most=1024)] = 0
    """CPU threads for tensor arithmetic; 0 leaves PyTorch's choice."""
    compile: bool = False
    """Whether the network is compiled before training."""
    progress_every_s: Annotated[float, Range(at_least=0, at_most=86_400)] = 30.0
    """Seconds between two writes of a round under way, from which a killed round goes on; more where writing
    would take over a twentieth of the time. 0: after each step, whatever it takes. A shorter round writes
    nothing."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        check(self, "site")
        folder = self.data_root.parent if self.data_root.is_file() else self.data_root  # a manifest's folder
        for setting, written in (("state_dir", self.state_dir), ("cache_dir", self.cache_dir)):
            if written is not None and written.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"Expected {setting} outside the data folder {folder}; got {written}. What the site "
                    "writes must not be taken for scans."
                )
        if self.cache_key_file is not None:
            self._check_key_file(self.cache_key_file)
        elif self.encrypt_cache and self.launcher:
            raise ValueError(
                "Expected cache_key_file where a launcher starts jobs and encrypt_cache is true; got none, "
                "and no job is told a passphrase."
            )
        if abs(sum(self.split_fractions) - 1.0) > 1e-9:
            raise ValueError(f"Expected split_fractions that sum to 1; got {list(self.split_fractions)}.")
        if self.allow_non_private and self.epsilon_ceiling:
            raise ValueError(
                "epsilon_ceiling has no effect with allow_non_private: true, under which releases without "
                "noise leave: remove one of the two."
            )
        check_sentence(self.latent_release)
        check_exact_sums(self.allow_exact_sums)
        if self.allowed_hours:
            AllowedHours.parse(self.allowed_hours)
        if self.plan_approval == "implied" and self.approvals != ApprovalRule():
            raise ValueError(
                "Expected plan_approval: required where approvals are set; got implied, which asks nobody."
            )

    @property
    def cache_folder(self) -> Path:
        """Where encodings lie."""
        return self.cache_dir or self.state_dir / "cache"

    def _check_key_file(self, key_file: Path) -> None:
        if not self.encrypt_cache:
            raise ValueError("cache_key_file has no effect with encrypt_cache: false: leave it out.")
        if key_file.resolve().is_relative_to(self.cache_folder.resolve()):
            raise ValueError(f"Expected cache_key_file outside the cache that it opens; got {key_file}.")


def processes_of(config: SiteConfig) -> Path:
    """The folder of what connects this site."""
    return config.processes_dir or config.state_dir / PROCESSES


def approvals_of(config: SiteConfig) -> Approvals:
    """The book of what this site approved, read by its own rule."""
    return Approvals(config.state_dir, config.approvals, config.name)


def ceiling_of(config: SiteConfig) -> Ceiling:
    """The most that the site's patients may be charged; none, where releases without noise may leave."""
    epsilon = math.inf if config.allow_non_private else config.epsilon_ceiling
    return Ceiling(epsilon=epsilon, delta=config.delta_ceiling)


def load_site_config(path: Path) -> SiteConfig:
    """Read `site.yaml`, strictly.

    Raises `ValueError` naming the file, and the setting that is unknown, missing or ill-typed.
    """
    values = read_yaml(read_text(path, "the site's settings"), f"settings in {path}")
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to hold settings (name: value); got {shown(values)}.")
    folder = path.resolve().parent
    spec = values.get("tokenizer")
    try:
        resolve_paths(values, PATHS, folder, "site")
        if isinstance(spec, dict) and isinstance(spec.get("path"), str):
            spec["path"] = str(path_from(spec["path"], folder, "site.tokenizer.path"))
        return build(SiteConfig, values, "site")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def resolve_device(choice: DeviceChoice) -> torch.device:
    """The device that a setting means on this machine.

    Raises `ValueError` when cuda is asked for and absent.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "Expected a CUDA device (site.yaml: device: cuda); PyTorch finds none. Check the driver with "
            "nvidia-smi, or set device: auto."
        )
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")
