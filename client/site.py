"""A site: one hospital's own settings, and everything it owns, opened only when it is needed.

`SiteConfig` is the hospital's half of a run (`site.yaml`): its folders, device, smallest cohort and consent.
It never leaves. The other half, `federation/plan.py`, is the same everywhere; the stricter of the two wins.
Opening a site opens its books (ledger, journal), not its scans: those are read by `Site.scans`, after the
ledger has reserved. Does not do: answer messages (`client/exchanges/exchange.py`), or let anything out
(`client/release.py`).
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from client.approvals import AllowedHours, Approvals
from client.approvers import ApprovalRule
from client.books import open_books
from client.confirmation import CURE, confirm, unconfirmed
from client.connection.keys import SiteKeys
from client.exact_sums import EXACT_SUMS_CONSENT
from client.exact_sums import check_sentence as check_exact_sums
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import check_sentence, consent
from client.forgotten import Forgotten
from client.latents.cache import LatentCache
from client.latents.cache_files import CacheFiles, ClearFiles
from client.latents.cache_keys import opener, sealed_files
from client.latents.latent_set import LatentSet
from client.latents.workers import Job, Workers
from client.scans.cohort import Cohort, NoScans, open_cohort
from client.scans.cohort_memo import remembered
from client.scans.judgement import Judges, one_by_one
from client.scans.judgement_memo import JudgementMemo
from client.scans.layouts import Found, LayoutRules, survey
from client.scans.patients import PatientMap
from client.site_secret import DRAWS, site_secret
from federation.bundle import running_bundle
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.keys.key_files import read_text
from federation.plan import WIRE_VERSION, RunPlan
from federation.published_plan import plan_of
from federation.wire import RefusalKind
from forms.form import build, check
from forms.names import Phrase, SiteName
from forms.paths import path_from, resolve_paths
from forms.ranges import Entries, Range, Share, shown
from forms.yaml_text import read_yaml
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from privacy.accounting import LARGEST_DELTA
from privacy.ledger import Ceiling, Ledger
from scans.volume_plan import VolumePlan
from storage.files import private_folder

DeviceChoice = Literal["auto", "cpu", "cuda"]
PATHS = ("data_root", "state_dir", "cache_dir", "cache_key_file", "keys_dir")
"""Settings of a site that are paths."""
SiteProgress = Callable[[str, int, int], None]
"""Called with what is being done ("reading", "encoding"), scans done, scans in all."""


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
    `client/exact_sums.py`; empty: they leave only above ten times as many patients as numbers."""
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


def load_plan(path: Path) -> RunPlan:
    """Read plan.json or a published plan, which the centre gives to every site. Raises `ValueError` naming
    the file."""
    try:
        text = read_text(path, "the plan")
    except ValueError as error:
        raise ValueError(f"{error} Ask the centre for plan.json.") from None
    try:
        return plan_of(text)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a plan of FedMeDUET; {error}") from None


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


class Site:
    """One hospital. Its books are open; its scans are read when `scans` is called, and not before."""

    def __init__(
        self,
        config: SiteConfig,
        tokenizer: Tokenizer | None = None,
        secret: bytes | None = None,
        identity: SiteIdentity | None = None,
    ) -> None:
        """Open the books in `config.state_dir`, creating it for its owner only.

        `tokenizer`: None loads the one that `config.tokenizer` names, when it is first needed. `secret`: what
        batches and folds are drawn from; None takes the site's own file, as every real site does. `identity`:
        None reads the keys in `config.keys_dir`, when it must sign. Raises
        `BrokenChain` when a book was tampered with or lost, and `ValueError` when the device is not there.
        """
        self.config = config
        self.name = config.name
        self.state_dir = config.state_dir
        self.compile = config.compile
        self.minimum_cohort = config.minimum_cohort
        self.exact_sums = config.allow_exact_sums == EXACT_SUMS_CONSENT
        self.progress_every_s = config.progress_every_s
        self.device = resolve_device(config.device)
        """Where scans are encoded and the network is trained."""
        private_folder(config.state_dir)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.ledger = Ledger(self.state_dir / "ledger.jsonl", ceiling_of(config))
        """What this site's patients have been charged; reserves before anything is read."""
        self.journal = Journal(self.state_dir / "journal.jsonl")
        """What left this site."""
        open_books(self.state_dir)
        self._given, self._secret, self._identity = tokenizer, secret, identity
        self._opened: dict[tuple[VolumePlan, int], LatentSet] = {}
        self.num_encoded = 0
        """Scans that were encoded since this site was opened."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The site's frozen tokenizer. Raises `ValueError` when its file is absent or damaged."""
        return self._given if self._given is not None else load_tokenizer(self.config.tokenizer)

    @cached_property
    def secret(self) -> bytes:
        """What its batches and folds are drawn from. Raises `ValueError` when its file is damaged."""
        return self._secret if self._secret is not None else site_secret(self.state_dir / DRAWS)

    def identity(self) -> SiteIdentity:
        """The site's key and certificate, with which it signs what other sites must believe. Raises
        `AskRefused` where they are missing or do not belong together."""
        if self._identity is None:
            try:
                self._identity = SiteKeys.read_identity(self.config.keys_dir)
            except ValueError as error:
                raise AskRefused(str(error), RefusalKind.NO_KEYS) from error
        return self._identity

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Raise `AskRefused` unless the plan fits this site, makes no latents leave without its agreement,
        its people have approved it (or the fine-tuning of that hash) with the code that is running, and it is
        an hour at which work may begin.

        Reads no scan.
        """
        self.fits(plan)
        if self.config.plan_approval == "required":
            self._approved(finetuning_sha256 or plan.sha256)
        hours = self.config.allowed_hours
        if hours and not AllowedHours.parse(hours).contain(datetime.now().time()):
            raise AskRefused(
                f"Expected to be asked between {hours} (site.yaml: allowed_hours). Nothing was read.",
                RefusalKind.OUTSIDE_HOURS,
            )

    def _approved(self, sha256: str) -> None:
        book = approvals_of(self.config)
        bundle = book.approved_bundle(sha256)
        if bundle is None:
            raise AskRefused(
                f"Expected a plan that this hospital approved; {len(book.approvers(sha256))} of "
                f"{book.rule.needed} needed approved {sha256[:12]}…: meduet-site plan show, plan approve. "
                "Nothing was read.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )
        if bundle != running_bundle():
            raise AskRefused(
                f"Plan {sha256[:12]}… was approved with code {bundle[:12]}…; the code that runs is "
                f"{running_bundle()[:12]}…. Nothing was read.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )

    def fits(self, plan: RunPlan) -> None:
        """Raise `AskRefused` unless the plan lists this site and was made for its tokenizer.

        What the site does for itself (encoding, checks) needs no more. Reads no scan.
        """
        if self.name not in plan.sites:
            raise AskRefused(
                f"Expected the plan to list {self.name!r}; it lists {', '.join(plan.sites)}. Set name in "
                "site.yaml to the agreed one. Nothing was read.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )
        if plan.wire_version != WIRE_VERSION:
            raise AskRefused(
                f"Plan is of wire version {plan.wire_version}; this site speaks {WIRE_VERSION}. Update the "
                "older side. Nothing was read.",
                RefusalKind.WRONG_VERSION,
            )
        if plan.tokenizer_sha256 != self.tokenizer.sha256:
            raise AskRefused(
                f"Plan asks for tokenizer {plan.tokenizer_sha256[:8]}…; this site has "
                f"{self.tokenizer.sha256[:8]}… (site.yaml: tokenizer). Nothing was read.",
                RefusalKind.WRONG_TOKENIZER,
            )
        consent(plan, self.config.latent_release)

    def cohort(
        self,
        volumes: VolumePlan,
        progress: SiteProgress | None = None,
        judges: Judges | None = None,
        found: Found | None = None,
    ) -> Cohort:
        """Which scans take part under `volumes`, and why others do not.

        Has every scan read the first time, by `judges` (None: here, encoding nothing), and again when its
        files changed. `found`: what `survey_site` has just found for `volumes`, so that headers are not read
        twice. Writes cohort.csv and exclusions.csv for the site's own eyes. Raises `ValueError` when the
        settings make no sense of the data folder, and what `judges` raise.
        """
        config = self.config
        rules: dict[str, Any] = {
            "layout": config.layout,
            "modality_names": config.modality_names,
            "patient_pattern": config.patient_pattern,
            "label_pattern": config.label_pattern,
            "follow_links": config.follow_links,
            "split_fractions": config.split_fractions,
            "split_salt": config.split_salt,
        }
        if not config.data_root.exists():
            raise NoScans(
                f"Expected scans at {config.data_root} (site.yaml: data_root); nothing is there. "
                "Is it mounted?"
            )

        forgotten = Forgotten(self.state_dir)

        def opened() -> Cohort:
            memo = JudgementMemo(self._memo.with_suffix(".judged"), dataclasses.asdict(volumes))
            asked = memo.judges(judges or one_by_one(volumes))
            reading = _phase(progress, "reading")
            return open_cohort(
                config.data_root,
                plan=volumes,
                found=found,
                judges=asked,
                progress=reading,
                forgotten=forgotten,
                **rules,
            )

        cohort = remembered(
            self._memo,
            config.data_root,
            {**rules, "volumes": dataclasses.asdict(volumes), "forgotten": forgotten.sha256},
            opened,
        )
        cohort.write_csv(self.state_dir)
        return cohort

    def cache(self, volumes: VolumePlan) -> LatentCache:
        """The cache of this site's encodings under `volumes`."""
        return LatentCache(self.config.cache_folder, self.tokenizer, volumes, self.cache_files)

    @cached_property
    def cache_files(self) -> CacheFiles:
        """How the files of its cache are kept; where they are sealed, nothing is left there in clear.

        Raises `ValueError` when the key does not open.
        """
        if not self.config.encrypt_cache:
            return ClearFiles()
        return sealed_files(self.config.cache_folder, opener(self.config.cache_key_file))

    @property
    def _memo(self) -> Path:
        """Where the cohort is remembered: beside a cache of its own folder, under the data root's name; never
        beside an encrypted one, since it names patients."""
        config = self.config
        if config.cache_dir is None or config.encrypt_cache:
            return self.state_dir / "cohort.json"
        root = hashlib.sha256(str(config.data_root.resolve()).encode()).hexdigest()
        return config.cache_dir / f"cohort-{root[:12]}.json"

    def scans(self, plan: RunPlan, progress: SiteProgress | None = None) -> LatentSet:
        """This site's encoded scans under `plan`, for what leaves: as `prepared`, once a person here has
        confirmed whose they are. Raises `AskRefused` before that, and as `prepared` does."""
        opened = self.prepared(plan, progress)
        if problem := unconfirmed(self.state_dir, self.config.data_root, opened.cohort.patient_map):
            raise AskRefused(f"{problem[0].upper()}{problem[1:]}. {CURE}", RefusalKind.PATIENTS_NOT_CONFIRMED)
        return opened

    def prepared(
        self, plan: RunPlan, progress: SiteProgress | None = None, num_workers: int = 1
    ) -> LatentSet:
        """This site's encoded scans under `plan`: opened once, each scan read, judged and encoded in one
        pass, by `num_workers` processes (1: by this one) if it is not cached; the same whatever their number.

        Scans that could not be encoded join exclusions.csv. Raises `AskRefused`, before any scan is read,
        when the plan does not fit (whether it was approved is asked by `accept`, before anything leaves);
        `NoScans` when no scan is usable; and what `cohort` and `LatentCache.encode` raise.
        """
        self.fits(plan)
        label = plan.sites.index(self.name)
        key = (plan.volumes, label)
        if key not in self._opened:
            cache = self.cache(plan.volumes)
            with ExitStack() as started:
                workers = None
                if num_workers != 1:
                    workers = started.enter_context(self._workers(cache.folder, plan.volumes, num_workers))
                judges = cache.judges(self.device, workers)
                cohort = self.cohort(plan.volumes, progress, judges)
                opened = cache.encode(cohort, self.device, _phase(progress, "encoding"), label, judges)
            self.num_encoded += judges.num_encoded
            opened.cohort.write_csv(self.state_dir)
            if not opened.num_scans:
                raise NoScans(
                    f"Expected a usable scan in {self.config.data_root}; got none. Excluded: "
                    f"{opened.cohort.summary()['exclusions']}. exclusions.csv in {self.state_dir} lists them."
                )
            self._opened[key] = opened
        return self._opened[key]

    def _workers(self, cache: Path, volumes: VolumePlan, num_workers: int) -> Workers:
        """Processes that read scans, and encode them where the device is the CPU."""
        spec, sha256 = self.config.tokenizer, self.tokenizer.sha256
        encodes = self.device.type == "cpu"
        return Workers(Job(cache, volumes, spec, sha256, encodes, self.cache_files), num_workers)


def survey_site(config: SiteConfig, volumes: VolumePlan | None = None) -> Found:
    """What the site's data folder holds, by names, tables and headers alone, as a plan of these `volumes`
    would call it. Raises `ValueError`."""
    if not config.data_root.exists():
        raise ValueError(
            f"Expected scans at {config.data_root} (site.yaml: data_root); nothing is there. Is it mounted?"
        )
    rules = LayoutRules(
        modality_names=config.modality_names,
        patient_pattern=config.patient_pattern,
        label_pattern=config.label_pattern,
        wanted=(volumes.modalities or (volumes.modality,)) if volumes is not None else (),
        follow_links=config.follow_links,
    )
    return survey(config.data_root, config.layout, rules)


def confirm_patients(config: SiteConfig, found: Found | None = None) -> PatientMap:
    """Keep the site's word that its patients are told apart rightly, as `found` has just shown them; returns
    what was confirmed.

    Raises `ValueError` when the data folder makes no sense, or no scan has a patient.
    """
    patients = (found or survey_site(config)).patients
    confirm(config.state_dir, config.data_root, patients)
    return patients


def open_site(config_path: Path) -> Site:
    """The site that a `site.yaml` describes. Raises as `load_site_config` and `Site` do."""
    return Site(load_site_config(config_path))


def _phase(progress: SiteProgress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
