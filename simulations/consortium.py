"""A consortium on one machine: simulated hospitals opened as the sites of a plan.

Each hospital becomes a site with a state folder of its own, exactly as on a hospital's machine; only who
opens it differs. In the pooled baseline one participant holds the scans of all of them.

Does not do: make hospitals (`hospitals.py`), pass messages (`in_process.py`, `ray_engine.py`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context

from client.consent.exact_sums import EXACT_SUMS_CONSENT
from client.latents.latent_set import LatentSet
from client.scans.patients import PatientMap
from client.settings import PATHS, SiteConfig
from client.site import Site
from client.site_scans import SiteProgress, confirm_patients
from federation.keys.certificates import Authority, PrivateKey, utc_now
from federation.keys.identity import SiteIdentity
from federation.plan.plan import RunPlan
from forms.form import build
from meduet_models.seeds import digest_of
from meduet_models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from privacy.accounting import LARGEST_DELTA
from simulations.hospitals.plans import Hospital
from simulations.settings import SimulationSettings

MANIFEST = "manifest.csv"
_SIMULATED_DAYS = 365
ANY = "*"
"""A site's name for scans whose modality nothing says."""


class PooledSite(Site):
    """The one participant of the pooled baseline: it holds every hospital's scans, each with its label."""

    def __init__(
        self, config: SiteConfig, hospitals: Sequence[Site], tokenizer: Tokenizer, secret: bytes
    ) -> None:
        super().__init__(config, tokenizer, secret)
        self._hospitals = hospitals

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """As each of the hospitals would."""
        for hospital in self._hospitals:
            hospital.accept(plan, finetuning_sha256)

    def scans(self, plan: RunPlan, progress: SiteProgress | None = None) -> LatentSet:
        """All hospitals' scans; a scan's site label is its hospital's."""
        merged = LatentSet.merge([hospital.scans(plan, progress) for hospital in self._hospitals])
        merged.cohort.write_csv(self.state_dir)
        return merged


@dataclass
class Consortium:
    """The hospitals of a run, and how they are opened. Travels to Ray's actors; what is open does not."""

    plan: RunPlan
    configs: tuple[SiteConfig, ...]
    """One per hospital: the plan's sites in its order, then those held out."""
    state: Path
    """Folder of the participants' state folders."""
    patients: dict[str, PatientMap] = field(default_factory=dict, repr=False)
    """Whose the scans of each hospital that was opened are taken to be; the run prints it."""
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Hospitals that take no part in the plan; hospital k of them has the site label sites + k."""
        return tuple(config.name for config in self.configs if config.name not in self.plan.sites)

    @property
    def everyone(self) -> RunPlan:
        """The plan as it would be if hospitals held out took part: for opening their scans, never asked.

        A hospital held out refuses the run's own plan, as any site refuses a plan that does not list it.
        """
        return dataclasses.replace(self.plan, sites=(*self.plan.sites, *self.held_out))

    def site(self, name: str) -> Site:
        """A hospital, or the pooled participant, opened once."""
        if "tokenizer" not in self._open:
            self._open["tokenizer"] = load_tokenizer(self.configs[0].tokenizer)
        if name not in self._open:
            self._open[name] = self._opened(name, self._open["tokenizer"])
        site: Site = self._open[name]
        return site

    def _opened(self, name: str, tokenizer: Tokenizer) -> Site:
        configs = {config.name: config for config in self.configs}
        if name in configs:
            self.patients[name] = confirm_patients(configs[name])  # as a person does at a hospital
            secret = simulated_secret(self.plan.seed, name)
            return Site(configs[name], tokenizer, secret, simulated_identity(name))
        own = dataclasses.replace(self.configs[0], name=name, state_dir=self.state / name)
        hospitals = [self.site(hospital) for hospital in self.plan.sites]
        return PooledSite(own, hospitals, tokenizer, simulated_secret(self.plan.seed, name))

    def open_by_context(self, context: Context) -> Site:
        """The participant whose number the engine put into the node's configuration."""
        return self.site(self.plan.participants[int(context.node_config["partition-id"])])

    def to_json(self) -> str:
        """Plan and settings, for the processes in which sites work; what is open does not travel."""
        configs = [dataclasses.asdict(config) for config in self.configs]
        return json.dumps({"plan": self.plan.to_json(), "configs": configs, "state": self.state}, default=str)

    @staticmethod
    def from_json(text: str) -> "Consortium":
        """Back from `to_json`, for a process of the same machine."""
        values = json.loads(text)
        for config in values["configs"]:
            config |= {name: Path(config[name]) for name in PATHS if config[name] is not None}
        configs = tuple(build(SiteConfig, config, "site") for config in values["configs"])
        return Consortium(RunPlan.from_json(values["plan"]), configs, Path(values["state"]))

    def __getstate__(self) -> Mapping[str, Any]:
        """Without what is open."""
        return {"plan": self.plan, "configs": self.configs, "state": self.state, "patients": {}, "_open": {}}


def simulated_secret(seed: int, site: str) -> bytes:
    """What a simulated site draws its batches from: no secret, so that the seed fixes the run."""
    return digest_of("fedmeduet simulated site", seed, site)


@cache
def simulated_identity(site: str) -> SiteIdentity:
    """What a simulated site signs with: a key of its name under an authority of no consortium, the same in
    every process of a run, and no secret."""
    key, authority = (_known_key(words) for words in (("site", site), ("authority",)))
    now = utc_now()
    signed = Authority.create("simulated", _SIMULATED_DAYS, now, authority)
    until = now + timedelta(days=_SIMULATED_DAYS - 1)
    return SiteIdentity(key, signed.site(site, key.public_key(), until, now), signed.certificate)


def _known_key(words: Sequence[str]) -> PrivateKey:
    number = int.from_bytes(digest_of("fedmeduet simulated key", *words), "big")
    return ec.derive_private_key(number, ec.SECP384R1())


def site_configs(
    hospitals: Sequence[Hospital],
    plan: RunPlan,
    settings: SimulationSettings,
    state: Path,
    cache: Path | None = None,
) -> tuple[SiteConfig, ...]:
    """The `site.yaml` that each hospital would have; every one agrees to releases that are not private, to
    exact sums over few patients, and to the release of latents where the plan asks for it; with privacy, to
    what the plan may cost a patient, and to nothing else.

    `cache`: folder of the hospitals' encodings where several runs share them; none: each in its state folder.
    """
    return tuple(
        SiteConfig(
            name=hospital.name,
            data_root=hospital.root / MANIFEST if hospital.layout == "manifest" else hospital.root,
            state_dir=state / hospital.name,
            cache_dir=None if cache is None else cache / hospital.name,
            layout=hospital.layout,
            modality_names={ANY: plan.volumes.modality, **settings.site.modality_names},
            patient_pattern=settings.site.patient_pattern,
            split_fractions=settings.site.split_fractions,
            minimum_cohort=plan.style.minimum_cohort,
            allow_non_private=plan.privacy is None,
            epsilon_ceiling=0.0 if plan.privacy is None else plan.privacy.epsilon,
            delta_ceiling=LARGEST_DELTA if plan.privacy is None else plan.privacy.delta,
            allow_exact_sums=EXACT_SUMS_CONSENT if plan.privacy is None else "",
            latent_release=plan.diffusion.release.consent if plan.diffusion else "",
            plan_approval="implied",
            tokenizer=settings.tokenizer,
            device=settings.device,
            compile=settings.compile,
        )
        for hospital in hospitals
    )
