"""Every number of a plan, and of the settings of a site and of the centre, has a range that is checked."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hydra.errors import ConfigCompositionException

from client.settings import SiteConfig
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from federation.keys.kits import Connection
from federation.plan.canary_plan import AuditCanariesPlan
from federation.plan.finetuning_privacy import FinetunePrivacy
from federation.plan.latent_privacy import AggregatePlan
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps, PrivacyPlan
from forms.form import build, check
from forms.names import Letters
from forms.ranges import Entries, Range
from server.config import compose_config, plain, plan_from
from server.consortium.provisioning import ConsortiumSettings
from server.deployment.config import ServerConfig

Path = tuple[str | int, ...]


def plan_of(*overrides: str) -> RunPlan:
    return plan_from(
        plain(compose_config(overrides)),
        sites=("a", "b", "c"),
        tokenizer_sha256="0" * 64,
        latent_channels=4,
        stride=4,
    )


PLAN = plan_of(
    "diffusion=raw",
    "+probes.anatomy.age=[20,90]",
    "demographics={age_edges:[20,60]}",
    "audit_counts={false_alarms:0.5}",
)
NOISY = NoisySteps(steps=4, steps_per_round=2, sampling_rate=0.5, clip_norm=1.0, epsilon_style=1.0)
PRIVACY = PrivacyPlan(level="full", epsilon=3.0, public_sha256="0" * 64, noisy=NOISY)
FINETUNING = FinetunePlan(
    run_sha256="0" * 64,
    pretrained_sha256="1" * 64,
    local=LocalFinetuning(task="classification", classes=2),
    target="sex",
    target_values=("F", "M"),
    privacy=FinetunePrivacy(epsilon=3.0, clip_norm=1.0, sampling_rate=0.5, expected_patients=8),
)


def leaves(
    hint: Any, value: Any, path: Path = (), rules: tuple[Any, ...] = ()
) -> Iterator[tuple[Path, Any, Any]]:
    """Path, type and rules of every number and text that a form may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from leaves(arguments[0], value, path, (*rules, *arguments[1:]))
    elif origin in (types.UnionType, typing.Union):
        (inner,) = [one for one in arguments if one is not type(None)]
        yield from leaves(inner, value, path, rules)
    elif dataclasses.is_dataclass(hint):
        found = typing.get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            inner = None if value is None else value[field.name]
            yield from leaves(found[field.name], inner, (*path, field.name))
    elif origin is tuple and arguments[-1] is Ellipsis:
        assert any(isinstance(rule, Entries) for rule in rules), f"{path} may have any number of entries"
        yield from leaves(arguments[0], value[0] if value else None, (*path, 0))
    elif origin is tuple:
        for i, inner in enumerate(arguments):
            yield from leaves(inner, None if value is None else value[i], (*path, i), rules)
    elif origin is dict:
        assert any(isinstance(rule, Entries) for rule in rules), f"{path} may have any number of entries"
        for key, entry in (value or {}).items():
            yield from leaves(arguments[1], entry, (*path, key))
    elif hint in (int, float, str):
        yield path, hint, rules


def lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lists(inner) for key, inner in value.items()}
    return [lists(inner) for inner in value] if isinstance(value, list | tuple) else value


NOISED = dataclasses.asdict(plan_of("diffusion=synthetic", "privacy=sums").diffusion) | {  # type: ignore[arg-type]
    "aggregate": dataclasses.asdict(AggregatePlan(epsilon_style=1.0, dimensions=4, samples=8))
}
WHOLE = dataclasses.asdict(PLAN) | {
    "privacy": dataclasses.asdict(PRIVACY),
    "diffusion": NOISED,
    "audit_canaries": dataclasses.asdict(AuditCanariesPlan(steps=2)),
}
FORMS: dict[str, tuple[Any, Any]] = {
    "plan": (RunPlan, lists(WHOLE)),
    "finetuning": (FinetunePlan, lists(dataclasses.asdict(FINETUNING))),
}


def dotted(name: str, path: Path) -> str:
    return name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


LEAVES = [(n, dotted(n, leaf[0]), leaf) for n, form in FORMS.items() for leaf in leaves(*form)]
NUMBERS = [(n, setting, leaf) for n, setting, leaf in LEAVES if leaf[1] is not str]


def changed(values: Any, path: Path, value: object) -> Any:
    copy = lists(values)
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return copy


def bounds(rules: Any) -> Range:
    (found,) = [rule for rule in rules if isinstance(rule, Range)]
    return found


def test_the_walk_finds_the_whole_of_both_plans() -> None:
    names = {setting for _, setting, _ in NUMBERS}
    assert len(names) == len(NUMBERS) > 90
    assert {"plan.diffusion.training.ema", "plan.volumes.shape[2]", "finetuning.local.steps"} <= names
    assert {"plan.objective.weights.mftd", "plan.probes.anatomy.age[0]"} <= names


@pytest.mark.parametrize(("name", "setting", "leaf"), NUMBERS, ids=[setting for _, setting, _ in NUMBERS])
def test_a_number_below_above_or_none_at_all_is_refused_by_its_name(
    name: str, setting: str, leaf: Any
) -> None:
    path, hint, rules = leaf
    limits = bounds(rules)
    low = limits.at_least if limits.at_least is not None else limits.above
    high = limits.at_most if limits.at_most is not None else limits.below
    assert low is not None and high is not None
    bad: list[object] = [math.nan, math.inf, -math.inf, 1e300, 10**400]
    if hint is int:
        bad += [int(low) - (limits.at_least is not None), int(high) + 1, 1.5]
    else:
        bad += [low if limits.above is not None else math.nextafter(low, -math.inf)]
        bad += [high if limits.below is not None else math.nextafter(high, math.inf)]
    kind, values = FORMS[name]
    for value in bad:
        with pytest.raises(ValueError) as refused:
            build(kind, changed(values, path, value), name)
        said = str(refused.value)
        assert setting in said and "\n" not in said and len(said) < 300, said


@pytest.mark.parametrize("setting", [s for _, s, leaf in LEAVES if leaf[1] is str])
def test_a_text_of_a_plan_has_letters_and_a_length(setting: str) -> None:
    (rules,) = [leaf[2] for _, name, leaf in LEAVES if name == setting]
    assert any(isinstance(rule, Letters) for rule in rules), f"{setting} may be any text"


@pytest.mark.parametrize("kind", [SiteConfig, ServerConfig, ConsortiumSettings, Connection])
def test_every_number_of_the_settings_of_a_machine_has_a_range(kind: type) -> None:
    for path, hint, rules in leaves(kind, None):
        assert hint is str or isinstance(bounds(rules), Range), path


@pytest.mark.parametrize("value", [math.nan, 0.0, 1e300])
def test_a_plan_made_in_code_is_checked_as_one_that_is_read(value: float) -> None:
    release = dataclasses.replace(PLAN.release, update_clip_norm=value)
    with pytest.raises(ValueError, match=r"plan\.release\.update_clip_norm above 0 and at most 10,000"):
        dataclasses.replace(PLAN, release=release)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["volumes.mr_percentiles=[99.5,0.5]"], "volumes.mr_percentiles"),
        (["+volumes.ct_window_hu=[250,-175]"], "volumes.ct_window_hu"),
        (["volumes.shape=[2048,2048,2048]"], "volumes.shape"),
        (["volumes.shape=3"], "volumes.shape"),
        (["volumes=null"], "volumes"),
        (["training.rounds=100000", "training.steps_per_round=1000000"], "training.steps_per_round"),
        (
            ["training.batch_size=4096", "network.width=4096", "network.heads=8", "network.depth=8"],
            "training.batch_size",
        ),
        (["network.width=4096", "network.depth=64"], "network.width"),
        (
            ["diffusion=raw", "diffusion.transformer.width=4096", "diffusion.transformer.depth=64"],
            "transformer",
        ),
        (["diffusion=federated", "diffusion.rounds=0"], "diffusion.rounds"),
        (["+probes.anatomy.age=[90,20]"], "probes.anatomy.age"),
        (["style.map_grid=[64,64,64]"], "style_map_grid"),
    ],
)
def test_settings_that_only_together_cannot_be_meant_are_refused_by_name(
    overrides: list[str], setting: str
) -> None:
    with pytest.raises((ValueError, ConfigCompositionException)) as refused:
        plan_of(*overrides)
    assert setting in str(refused.value)


@dataclasses.dataclass(frozen=True)
class Bare:
    clip: float


@dataclasses.dataclass(frozen=True)
class Ranged:
    clip: Annotated[float, Range(above=0, at_most=10)]


def test_the_range_is_what_refuses() -> None:
    assert math.isnan(build(Bare, {"clip": math.nan}).clip)
    with pytest.raises(ValueError, match="clip above 0"):
        build(Ranged, {"clip": math.nan})
    with pytest.raises(ValueError, match=r"made\.clip above 0"):
        check(Ranged(math.nan), "made")
