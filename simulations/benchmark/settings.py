"""What the benchmark is told, and the cells that follow: one method on one data set with one seed.

A cell's settings are those of an ordinary run (`conf/config.yaml`), composed from the data set's experiment,
the method, the size and the seed. Its key is a hash of everything its numbers follow from, so a result that
is there is known to be that cell's. Composed and checked before anything is made.
What this file does not do: it runs nothing (`benchmark.py`, `benchmark_cell.py`).
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from federation.exchanges.finetuning import LocalFinetuning, check_target
from forms.form import build
from forms.json_text import fingerprint_of
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from server.config import CONF, compose_config, plain, plan_from
from simulations.settings import settings_from

Patients = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    title: str
    """What it is called."""
    like: str = ""
    """Method whose plan it has and, where it is trained, whose weights; empty: that of its own name."""
    weights: Literal["trained", "untrained", "none"] = "trained"
    """`untrained`: the network's start, with the federated latent scale; `none`: no pretrained encoder, only
    the downstream tasks from scratch."""
    erasure: bool = True
    """Whether content is measured after the site erasure."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.weights != "trained" and self.erasure:
            raise ValueError(
                f"{self.title}: erasure has no effect on weights={self.weights}: set it to false."
            )


@dataclass(frozen=True, kw_only=True)
class Task:
    """A downstream task on a data set."""

    task: str
    """Name of a downstream task."""
    classes: int
    """Classes, background included; 1 for a number."""
    target: str = ""
    """Covariate that is to be told, of a task that tells one."""
    values: tuple[str, ...] = ()
    """Its values, in the order of the classes; of a number the ends of its range."""
    label_counts: tuple[int, ...] = ()
    """Numbers of patients (of each class, of a task with classes) whose labels are used."""
    label_shares: tuple[float, ...]
    """Shares of the training patients whose labels are used."""
    draws: int = 20
    """Draws of the labelled patients for what is in closed form."""
    trained_draws: int = 1
    """Draws for what is trained."""
    steps: int
    """Optimiser steps."""

    def __post_init__(self) -> None:
        """Refuse a task that contradicts itself."""
        local = LocalFinetuning(task=self.task, classes=self.classes)
        check_target(local, self.target, self.values)


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """A data set at a size."""

    overrides: tuple[str, ...]
    """Settings of the runs (`name=value`)."""
    tasks: tuple[Task, ...]
    """Downstream tasks."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The whole benchmark."""

    folder: str
    """Where everything goes."""
    root: str | None
    """Folder of the real scans; none where no data set needs one."""
    data: tuple[str, ...]
    """Data sets; each is an experiment `benchmark_<name>`."""
    methods: tuple[str, ...]
    """Methods, in the order of the table."""
    seeds: tuple[int, ...]
    """Seeds of hospitals, start and draws."""
    size: str
    """Which of `sizes`."""
    patients: Patients
    """Whose scans are measured: those kept for test, with the hospitals held out; or those for validation,
    without them."""
    workers: int
    """Cells at once."""
    device: Literal["auto", "cpu", "cuda"]
    """Device of every cell."""
    overrides: tuple[str, ...]
    """Settings of every run, after all others."""
    table: dict[str, Variant]
    """What each method is called and how it comes about."""
    sizes: dict[str, dict[str, SizeSettings]]
    """Settings by size and data set."""

    def __post_init__(self) -> None:
        """Refuse names that mean nothing, before anything is made."""
        for what, chosen, known in (
            ("size", (self.size,), self.sizes),
            ("data", self.data, self.sizes.get(self.size, {})),
            ("methods", self.methods, self.table),
        ):
            if unknown := [name for name in chosen if name not in known]:
                raise ValueError(f"Expected {what} among {', '.join(known)}; got {unknown[0]!r}.")
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"Expected {what} to name one or more, each once.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("Expected seeds to name one or more, each once.")
        if self.workers < 1:
            raise ValueError(f"Expected workers to be at least 1; got {self.workers}.")
        for name in self.methods:
            like = self.table[name].like or name
            if not (CONF / "method" / f"{like}.yaml").is_file():
                raise ValueError(f"Expected conf/method/{like}.yaml for method {name!r}; nothing is there.")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The hospitals of a data set with a seed, made and encoded once for all its cells."""

    name: str
    seed: int
    config: dict[str, Any]
    """Settings of a run on it."""
    folder: str

    @property
    def label(self) -> str:
        """How it is called in progress and errors."""
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one data set with one seed."""

    data: str
    method: str
    seed: int
    variant: Variant
    patients: Patients
    tasks: tuple[Task, ...]
    config: dict[str, Any]
    """Settings of the run; its folder is shared by cells of the same weights."""
    made: str
    """Folder of the data set."""
    result: str
    """Path of the result's JSON."""
    key: str
    """Hash of everything that the result follows from."""

    @property
    def label(self) -> str:
        """How it is called in progress and errors."""
        return f"{self.data} {self.method}, seed {self.seed}"

    @staticmethod
    def from_json(text: str) -> "Cell":
        """The cell that `to_json` wrote."""
        values = json.loads(text)
        tasks = tuple(build(Task, task, "task") for task in values.pop("tasks"))
        return Cell(**values | {"variant": build(Variant, values["variant"], "variant"), "tasks": tasks})

    def to_json(self) -> str:
        """As JSON, for the process that computes it."""
        return json.dumps(asdict(self), sort_keys=True)


def benchmark_settings(values: Mapping[str, Any]) -> BenchmarkSettings:
    """The settings in plain `values`; raises `ValueError` naming what is wrong."""
    return build(BenchmarkSettings, dict(values), "benchmark")


def cells_of(settings: BenchmarkSettings) -> tuple[list[DataSet], list[Cell]]:
    """The data sets to be made, and the cells in the order of the table; every plan has been checked.

    Raises `ValueError` when a setting is unknown, contradicts another, or needs `root` and there is none.
    """
    sets, cells = [], []
    for data in settings.data:
        for seed in settings.seeds:
            made = _data_set(settings, data, seed)
            sets.append(made)
            cells += [_cell(settings, made, method) for method in settings.methods]
    return sets, cells


def _data_set(settings: BenchmarkSettings, data: str, seed: int) -> DataSet:
    config = _compose(settings, data, "meduet", seed)
    decides = {name: config[name] for name in ("hospitals", "volumes", "tokenizer", "site")}
    folder = Path(settings.folder) / "data" / f"{data}-{seed}-{fingerprint_of(decides)[:8]}"
    return DataSet(name=data, seed=seed, config={**config, "folder": str(folder)}, folder=str(folder))


def _cell(settings: BenchmarkSettings, made: DataSet, method: str) -> Cell:
    variant = settings.table[method]
    like = variant.like or method
    config = _compose(settings, made.name, like, made.seed)
    tasks = settings.sizes[settings.size][made.name].tasks
    follows = {
        "version": importlib.metadata.version("fedmeduet"),
        "config": config,
        "variant": {k: v for k, v in asdict(variant).items() if k != "title"},
        "tasks": [asdict(task) for task in tasks],
        "patients": settings.patients,
    }
    folder = Path(settings.folder)
    weights = like if variant.weights == "trained" else method  # cells of the same weights share their run
    run = folder / "runs" / f"{made.name}-{weights}-{made.seed}-{fingerprint_of(config)[:8]}"
    result = folder / "results" / f"{made.name}-{method}-{made.seed}-{settings.patients}.json"
    return Cell(
        data=made.name,
        method=method,
        seed=made.seed,
        variant=variant,
        patients=settings.patients,
        tasks=tasks,
        config={**config, "folder": str(run)},
        made=made.folder,
        result=str(result),
        key=fingerprint_of(follows),
    )


def _compose(settings: BenchmarkSettings, data: str, method: str, seed: int) -> dict[str, Any]:
    """Settings of a run, checked; `folder` is empty."""
    first = [f"experiment=benchmark_{data}", f"method={method}", f"seed={seed}"]
    own = [
        f"name={data}-{method}-{seed}",
        "folder=''",
        "engine.cpus_per_site=1",
        "engine.workers=1",
        f"device={settings.device}",
    ]
    roots: Sequence[str] = [] if settings.root is None else [f"root='{Path(settings.root).resolve()}'"]
    if data == "phantoms":
        roots = []
    size = settings.sizes[settings.size][data].overrides
    config = plain(compose_config([*first, *own, *roots, *size, *settings.overrides]))
    run, _ = settings_from(config)
    tokenizer = _tokenizer(run.tokenizer)
    plan_from(
        config,
        sites=["any"],
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )
    return config


@lru_cache
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    return load_tokenizer(spec)
