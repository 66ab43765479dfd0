"""What the work of an answer has of a site: its settings, its scans, and what to compute on. No book, no key.

Scans are found, judged and encoded when they are asked for, and not before. A job
(`client/jobs/program.py`) has this much of a site; the process of a question has all of it
(`client/site.py`). Does not do: say yes to a plan, or let anything out.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from client.books.forgotten import Forgotten
from client.consent.confirmation import CURE, confirm, unconfirmed
from client.consent.exact_sums import EXACT_SUMS_CONSENT
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import consent
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
from client.secrets.site_secret import DRAWS, site_secret
from client.settings import SiteConfig, resolve_device
from federation.plan.plan import WIRE_VERSION, RunPlan
from federation.wire.wire import RefusalKind
from forms.json_text import fingerprint_of
from meduet_models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from scans.volume_plan import VolumePlan
from storage.files import private_folder

SiteProgress = Callable[[str, int, int], None]
"""Called with what is being done ("reading", "encoding"), scans done, scans in all."""


class SiteScans:
    """The scans of one hospital, read when `scans` is called, and not before."""

    def __init__(
        self, config: SiteConfig, tokenizer: Tokenizer | None = None, secret: bytes | None = None
    ) -> None:
        """Create `config.state_dir` for its owner only; nothing is read.

        `tokenizer`: None loads the one that `config.tokenizer` names, when it is first needed. `secret`: what
        batches and folds are drawn from; None takes the site's own file, as every real site does.
        """
        self.config = config
        self.name = config.name
        self.state_dir = config.state_dir
        self.compile = config.compile
        self.minimum_cohort = config.minimum_cohort
        self.exact_sums = config.allow_exact_sums == EXACT_SUMS_CONSENT
        self.progress_every_s = config.progress_every_s
        private_folder(config.state_dir)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._given, self._secret = tokenizer, secret
        self._opened: dict[tuple[VolumePlan, int], LatentSet] = {}
        self.num_encoded = 0
        """Scans that were encoded since this site was opened."""

    @cached_property
    def device(self) -> torch.device:
        """Where scans are encoded and the network is trained. Raises `ValueError` when it is not there."""
        return resolve_device(self.config.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The site's frozen tokenizer. Raises `ValueError` when its file is absent or damaged."""
        return self._given if self._given is not None else load_tokenizer(self.config.tokenizer)

    @cached_property
    def secret(self) -> bytes:
        """What its batches and folds are drawn from. Raises `ValueError` when its file is damaged."""
        return self._secret if self._secret is not None else site_secret(self.state_dir / DRAWS)

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

        memo_of_cohort = self._memo(volumes)

        forgotten = Forgotten(self.state_dir)

        def opened() -> Cohort:
            memo = JudgementMemo(memo_of_cohort.with_suffix(".judged"), dataclasses.asdict(volumes))
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
            memo_of_cohort,
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

    def _memo(self, volumes: VolumePlan) -> Path:
        """Where the cohort of these volumes is remembered, each plan's for itself: beside a cache of its own
        folder, under the data root's name too; never beside an encrypted one, since it names patients."""
        config = self.config
        made_for = fingerprint_of(dataclasses.asdict(volumes))[:12]
        if config.cache_dir is None or config.encrypt_cache:
            return self.state_dir / f"cohort-{made_for}.json"
        root = hashlib.sha256(str(config.data_root.resolve()).encode()).hexdigest()
        return config.cache_dir / f"cohort-{root[:12]}-{made_for}.json"

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


def _phase(progress: SiteProgress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
