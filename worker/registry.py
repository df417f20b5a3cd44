"""The jobs there are: one per module in `tasks/`, found by import."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import tasks
from worker.errors import Refused
from worker.job import Job

if TYPE_CHECKING:
    from types import ModuleType


@cache
def jobs() -> Mapping[str, type[Job]]:
    """Every job by its name. A module without exactly one job, or two jobs of one name, is an error."""
    found: dict[str, type[Job]] = {}
    for module in sorted(pkgutil.iter_modules(tasks.__path__), key=lambda item: item.name):
        job = _only_job(importlib.import_module(f"tasks.{module.name}"))
        if job.name in found:
            raise TypeError(f"two jobs are named {job.name}: {found[job.name].__module__}, {job.__module__}")
        found[job.name] = job
    return MappingProxyType(found)


def _only_job(module: ModuleType) -> type[Job]:
    own = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Job) and item.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise TypeError(f"{module.__name__} must hold exactly one job, not {len(own)}")
    return own[0]


def job(name: str) -> type[Job]:
    """The job of that name. Refused, naming those there are, when there is none."""
    try:
        return jobs()[name]
    except KeyError:
        raise Refused(f"there is no job {name!r}; jobs: {', '.join(jobs())}") from None
