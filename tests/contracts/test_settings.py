"""Every setting has a sentence, and a reader that reads it from its own class.

A name that is read somewhere is no proof: `seed`, `kind` or `steps` stand in many classes. So the code is
read with types: a variable's from its annotation, or from what it was made of; an attribute's from the
dataclass that declares it. What cannot be told that way counts only where the name is one class's own.
"""

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.settings import SiteConfig
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from federation.plan.canary_plan import AuditCanariesPlan
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.finetuning_privacy import FinetunePrivacy
from federation.plan.latent_privacy import AggregatePlan, SyntheticPlan
from federation.plan.plan import (
    AggregationPlan,
    AuditCountsPlan,
    ProbePlan,
    ReleasePlan,
    RunPlan,
    StylePlan,
    TrainingPlan,
)
from federation.plan.privacy_plan import NoisySteps, PrivacyPlan
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.meduet import NetworkConfig
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from scans.volume_plan import VolumePlan
from server.deployment.config import ServerConfig
from simulations.downstream.evaluate import DownstreamSettings
from simulations.downstream.run import DownstreamRunSettings
from simulations.settings import EngineSettings, EvaluationSettings, SimulationSettings, SiteSettings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "forms", "meduet_models", "privacy", "federation", "strategies", "audit", "client", "server",
    "simulations",
)  # fmt: skip
SETTINGS = (
    RunPlan,
    VolumePlan,
    TrainingPlan,
    StylePlan,
    AggregationPlan,
    ReleasePlan,
    ProbePlan,
    AuditCountsPlan,
    AuditCanariesPlan,
    PrivacyPlan,
    NoisySteps,
    SyntheticPlan,
    AggregatePlan,
    NetworkConfig,
    ObjectiveConfig,
    LossWeights,
    FinetunePlan,
    LocalFinetuning,
    FinetunePrivacy,
    DiffusionPlan,
    TransformerShape,
    DiffusionTraining,
    SimulationSettings,
    EngineSettings,
    EvaluationSettings,
    SiteSettings,
    DownstreamSettings,
    DownstreamRunSettings,
    ServerConfig,
    SiteConfig,
)
KNOWN = {kind.__name__: kind for kind in SETTINGS}
EVERY_FIELD = {
    "LossWeights": "meduet_models/objective/objective.py multiplies each term with the weight of its name"
}
"""Classes whose fields are read by a loop over all of them."""


def named_in(annotation: Any) -> str | None:
    """The settings class in an annotation: alone, or with None."""
    kinds = [k for k in (typing.get_args(annotation) or (annotation,)) if getattr(k, "__name__", "") in KNOWN]
    return kinds[0].__name__ if kinds else None


FIELD_KINDS = {
    (kind.__name__, name): named_in(hint)
    for kind in SETTINGS
    for name, hint in typing.get_type_hints(kind).items()
}
DECLARED = {(kind.__name__, field.name) for kind in SETTINGS for field in dataclasses.fields(kind)}


class Reader(ast.NodeVisitor):
    """Collects (class, field) pairs that one module reads."""

    def __init__(self, returned: dict[str, str]) -> None:
        self.returned = returned
        self.read: set[tuple[str, str]] = set()
        self.attributes: dict[str, str] = {}  # attributes of self, by name, of this class
        self.scopes: list[dict[str, str]] = [{}]

    def kind_of(self, node: ast.expr) -> str | None:
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self.attributes:
                return self.attributes[name]
            case ast.Attribute(value=value, attr=name):
                owner = self.kind_of(value)
                if owner is not None:
                    return FIELD_KINDS.get((owner, name))
                kinds = {kind for (_, field), kind in FIELD_KINDS.items() if field == name and kind}
                return kinds.pop() if len(kinds) == 1 else None
            case ast.Call(func=ast.Name(id=name)) if name in KNOWN:
                return name
            case ast.Call(func=ast.Name(id=name)) if name in self.returned:
                return self.returned[name]
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if name in KNOWN:
                return name if method.startswith("from_") else None
            case ast.Call(
                func=ast.Attribute(attr="replace" | "plan" | "finetuning" as method), args=[*given]
            ):
                by_method = {"plan": "RunPlan", "finetuning": "FinetunePlan"}
                return by_method.get(method) or (self.kind_of(given[0]) if given else None)
        return None

    def annotated(self, annotation: ast.expr | None) -> str | None:
        names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else set()
        found = names & set(KNOWN)
        return found.pop() if len(found) == 1 and not names & {"dict", "list", "tuple", "Mapping"} else None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.attributes = self.attributes, {}
        for item in ast.walk(node):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if kind := self.annotated(item.annotation):
                    self.attributes[item.target.id] = kind
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                self.scopes.append(self.arguments(item))
                for line in ast.walk(item):
                    if isinstance(line, ast.Assign):
                        self.assigned(line)
                self.scopes.pop()
        self.scopes.append({"self": node.name, "cls": node.name} if node.name in KNOWN else {})
        self.generic_visit(node)
        self.scopes.pop()
        self.attributes = before

    def arguments(self, node: ast.FunctionDef) -> dict[str, str]:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return {a.arg: kind for a in every if (kind := self.annotated(a.annotation))}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scopes.append(self.arguments(node))
        if node.returns is not None and (kind := self.annotated(node.returns)):
            self.scopes[-1][node.name] = kind
        for line in ast.walk(node):
            if isinstance(line, ast.Assign):
                self.assigned(line)
            if isinstance(line, ast.NamedExpr) and (kind := self.kind_of(line.value)):
                self.scopes[-1][line.target.id] = kind
        self.generic_visit(node)
        self.scopes.pop()

    def assigned(self, node: ast.Assign) -> None:
        for target, value in self.pairs(node):
            kind = self.kind_of(value)
            if kind and isinstance(target, ast.Name):
                self.scopes[-1][target.id] = kind
            elif kind and isinstance(target, ast.Attribute):
                self.attributes[target.attr] = kind

    @staticmethod
    def pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            owners = {kind for kind, field in DECLARED if field == node.attr}
            owner = self.kind_of(node.value)
            if owner in owners:
                self.read.add((owner, node.attr))
            elif owner is None and len(owners) == 1:
                self.read.add((owners.pop(), node.attr))
        self.generic_visit(node)


def settings_read(*sources: str) -> set[tuple[str, str]]:
    read: set[tuple[str, str]] = set()
    trees = [ast.parse(source) for source in sources]
    returned = returned_by(trees)
    for tree in trees:
        reader = Reader(returned)
        reader.visit(tree)
        read |= reader.read
    return read


def returned_by(trees: list[ast.Module]) -> dict[str, str]:
    """The settings class that functions of a name return, where there is one of that name only."""
    found: dict[str, set[str | None]] = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, set()).add(Reader({}).annotated(node.returns))
    return {name: kind for name, kinds in found.items() if len(kinds) == 1 and (kind := kinds.copy().pop())}


@pytest.fixture(scope="module")
def read() -> set[tuple[str, str]]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return settings_read(*(path.read_text(encoding="utf-8") for path in paths))


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_reader_of_its_own_class(kind: type, read: set[tuple[str, str]]) -> None:
    if kind.__name__ in EVERY_FIELD:
        return
    names = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in names if (kind.__name__, name) not in read] == []


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_sentence(kind: type) -> None:
    sentences = _sentences(kind)
    assert [field.name for field in dataclasses.fields(kind) if not sentences.get(field.name)] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(plan: RunPlan): return plan.training.rounds", {("TrainingPlan", "rounds")}),
        ("def f(p: FinetunePlan): return p.rounds", {("FinetunePlan", "rounds")}),
        ("def f(p): return p.rounds", set()),
        ("class A:\n def __init__(self, p: RunPlan):\n  self.p = p.style\n def g(self): return self.p.head",
         {("StylePlan", "head")}),
        ("def f(plan: RunPlan):\n s = plan.aggregation\n return s.trim", {("AggregationPlan", "trim")}),
        ("def n(p) -> NoisySteps: ...\ndef f(p): return n(p).clip_norm", {("NoisySteps", "clip_norm")}),
        ("def f(p: PrivacyPlan):\n if (n := p.noisy): return n.clip_norm", {("NoisySteps", "clip_norm")}),
    ],
)  # fmt: skip
def test_a_namesake_of_another_class_is_no_reader(source: str, expected: set[tuple[str, str]]) -> None:
    found = settings_read(source)
    assert expected <= found
    assert {field for _, field in found - expected} & {field for _, field in expected} == set()


def _sentences(kind: type) -> dict[str, str]:
    module = ROOT / Path(*kind.__module__.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            found: dict[str, str] = {}
            for item, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                    assert isinstance(item.target, ast.Name)
                    if isinstance(after.value, ast.Constant):
                        found[item.target.id] = str(after.value.value)
            return found
    raise AssertionError(f"{kind} not found")
