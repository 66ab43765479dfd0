"""The table of downstream tasks: a further one is a file beside these and a row here.

What this file does not do: it predicts nothing.
"""

from meduet_models.downstream.classification import Classification
from meduet_models.downstream.regression import Regression
from meduet_models.downstream.segmentation import Segmentation
from meduet_models.downstream.task import Metric, Task

TASKS: dict[str, Task] = {task.name: task for task in (Segmentation(), Classification(), Regression())}


def task_of(name: str) -> Task:
    """The task of this name; raises `ValueError` for a word that is none."""
    if name not in TASKS:
        raise ValueError(f"Expected task to be one of {', '.join(TASKS)}; got {name[:40]!r}.")
    return TASKS[name]


def metric_of(name: str) -> Metric:
    """What is said of a metric; of one that no task tells, its name."""
    found = (metric for task in TASKS.values() for metric in task.metrics if metric.name == name)
    return next(found, Metric(name, name))
