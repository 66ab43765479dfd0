"""Making a consortium's plan, and publishing it: the file that sites look at and approve, with the hash of
the code it will run in.

Does not do: start a run (`server/app.py`), or send the file: it holds no secret, any way will do.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from federation.bundle import running_bundle
from federation.exchanges.finetuning import FinetunePlan
from federation.keys.key_files import read_text
from federation.plan.finetuning_privacy import with_noise
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan, plan_of
from forms.form import build
from forms.json_text import read_json
from forms.yaml_text import read_yaml
from meduet_models.published.expiry import EXPIRES, check_unexpired
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from server.config import FROM_CONFIG, compose_config, plain, plan_from
from server.consortium.provisioning import ConsortiumSettings
from server.latent_bank.records import public_key
from server.public_scans import PUBLIC_SCANS, drawn_public_scans
from server.volume_start import with_start
from storage.files import write_whole

_SETTINGS = ("network", "tokenizer", "hospitals", "experiment", "method")
"""Settings and groups of settings that decide on a plan, beside its own parts."""
_PARTS = ("local", "privacy")
"""Parts of a fine-tuning."""
_VALUES = "target_values"
"""Values of a covariate are texts, also those that YAML takes for numbers or for true and false."""


def make_plan(
    consortium: ConsortiumSettings,
    overrides: Sequence[str] = (),
    folder: Path = Path(),
    bank_key: Path | None = None,
    anatomy: Path | None = None,
) -> RunPlan:
    """The plan of these hospitals, from `conf/` and `overrides` in Hydra's words (``training.rounds=20``).

    The grid of volumes is that of `hospitals=folders` unless an override says otherwise; of a group
    `hospitals` only that grid counts. Public scans of a plan with privacy are drawn into `folder`. A plan
    under which latents leave, of scans or samples, names the public key of the bank whose key is in the file
    `bank_key`, made when there is none; one with a start from public anatomy the hash of that in the file
    `anatomy` (none: of the shipped one). Raises `ValueError` for a setting that is wrong, or has no effect on
    a plan.
    """
    keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if key.split(".")[0] not in (*_SETTINGS, *FROM_CONFIG) or key.startswith("hospitals."):
            raise ValueError(f"{override} has no effect on a plan: leave it out.")
    given = [] if "name" in keys else [f"name={consortium.name}"]
    given += [] if {"hospitals", "experiment"} & set(keys) else ["hospitals=folders"]
    try:
        settings = plain(compose_config([*given, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"Expected settings of conf/: {' '.join(str(error).split())}") from None
    spec = build(TokenizerSpec, settings["tokenizer"], "tokenizer")
    tokenizer = load_tokenizer(spec)
    made = plan_from(
        settings,
        sites=[site.name for site in consortium.sites],
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )
    made = with_start(made, spec, anatomy)
    releases = made.diffusion is not None and made.diffusion.release.sealed
    if releases != (bank_key is not None):
        raise ValueError(
            "Expected --bank-key FILE, the key of the bank that latents are sealed to, with a plan under "
            "which sites release latents, and only with it. The file is made when there is none."
        )
    if made.diffusion is not None and bank_key is not None:
        diffusion = dataclasses.replace(made.diffusion, recipient=public_key(bank_key))
        made = dataclasses.replace(made, diffusion=diffusion)
    if made.privacy is None:
        return made
    public_sha256 = drawn_public_scans(made, tokenizer, folder / PUBLIC_SCANS)
    return dataclasses.replace(made, privacy=dataclasses.replace(made.privacy, public_sha256=public_sha256))


def publish(plan: Path, folder: Path, finetuning: Path | None = None) -> tuple[Path, PublishedPlan]:
    """Write `<hash>.plan.json` for a plan's JSON (and a fine-tuning of it) into `folder`.

    Published again, a plan has the same name and content as long as the code is the same. Raises `ValueError`
    naming the file that is not what it should be.
    """
    published = PublishedPlan(
        plan=_plan(plan),
        bundle_sha256=running_bundle(),
        finetuning=None if finetuning is None else _finetuning(finetuning),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / published.file_name
    write_whole(path, published.to_json())
    return path, published


def plan_to_run(path: Path) -> RunPlan:
    """The run's plan from a published plan or a plan's own JSON.

    Raises `ValueError` when it was published with other code than this: every site would refuse it.
    """
    plan = _plan(path)
    values = read_json(read_text(path, "a plan"), "a plan")
    if (published := values.get("bundle_sha256", running_bundle())) != running_bundle():
        raise ValueError(
            f"Expected a plan published with this code ({running_bundle()[:12]}…); {path} was published with "
            f"{published[:12]}…. Publish it again (meduet-server publish) and let the sites approve it."
        )
    return plan


def finetuning_to_run(path: Path) -> FinetunePlan | None:
    """The fine-tuning that a file publishes; None when what it publishes is the run itself.

    Raises `ValueError` as `plan_to_run`.
    """
    plan_to_run(path)
    text = read_text(path, "a plan")
    published = "bundle_sha256" in read_json(text, "a plan")
    return PublishedPlan.from_json(text).finetuning if published else None


def make_finetuning(pretrained: Path, settings: Sequence[str], anatomy: Path | None = None) -> FinetunePlan:
    """The fine-tuning of a finished run (its folder, or its model.safetensors), from settings as ``rounds=5``
    or ``local.task=segmentation``; a start from public anatomy from the file `anatomy`, or the shipped one.

    Raises `ValueError` for a setting that is wrong, and for a file that is no run's final weights, or whose
    use was agreed until a day that is past.
    """
    from server.exchanges.finetuning import pretrained_of, pretrained_sha256  # MONAI takes seconds to import

    found = pretrained_of(pretrained)
    check_unexpired(found.provenance.get(EXPIRES, ""), "a pretrained encoder")
    values: dict[str, Any] = {
        "run_sha256": found.provenance.get("plan_sha256", ""),
        "pretrained_sha256": pretrained_sha256(found.network),
        "local": {},
    }
    for setting in settings:
        name, equals, text = setting.partition("=")
        part, _, inner = name.rpartition(".")
        if not equals or part not in ("", *_PARTS) or name in (*values, *_PARTS):
            raise ValueError(
                f"Expected settings of a fine-tuning as rounds=5 or local.classes=3; got {setting!r}."
            )
        value = (
            [one.strip() for one in text.strip("[]").split(",")]
            if inner == _VALUES
            else read_yaml(text, name)
        )
        (values.setdefault(part, {}) if part else values)[inner] = text if inner == "target" else value
    named = build(FinetunePlan, values, "finetuning")
    if anatomy is not None and named.anatomy_start == "none":
        raise ValueError("--anatomy has no effect without anatomy_start=canonical or shapes: leave it out.")
    started = pretrained_sha256(found.network, named.local.network, named.anatomy_start, named.seed, anatomy)
    return with_noise(dataclasses.replace(named, pretrained_sha256=started))


def _plan(path: Path) -> RunPlan:
    text = read_text(path, "a plan")
    try:
        return plan_of(text)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a plan of FedMeDUET; {error}") from None


def _finetuning(path: Path) -> FinetunePlan:
    text = read_text(path, "a fine-tuning")
    try:
        return FinetunePlan.from_json(text)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a fine-tuning of FedMeDUET; {error}") from None
