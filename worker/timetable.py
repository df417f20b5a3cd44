"""The schedule of this deployment: `schedules.SCHEDULE` as the operator's file changes it, and Celery's arithmetic.

Beat, `launch`, `schedule list` and the metrics all read this one value, so they cannot disagree.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from celery import Celery
from celery.schedules import ParseException, crontab
from pydantic import BaseModel, ValidationError

import schedules
from schedules import Entry
from worker import canonical, layouts, params, registry
from worker.errors import Refused, SettingsError

if TYPE_CHECKING:
    from worker.config import Settings
    from worker.job import Job
    from worker.layouts.model import Layout
    from worker.operations import Operations

M = TypeVar("M", bound=BaseModel)

# Beat's own, beside the jobs.
RESCUE, MEASURE = "rescue", "measure"
# More due times than this are not counted.
MOST_MISSED = 100
_FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day_of_month": "1-31",
    "month_of_year": "1-12 or jan-dec",
    "day_of_week": "0-6 or sun-sat",
}
# A name is part of a Redis key and a label of metrics.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """Every entry by name, those that are switched off too, and the timezone their crontabs are read in."""

    timezone: str
    entries: Mapping[str, Entry]

    @property
    def enabled(self) -> Mapping[str, Entry]:
        """The entries that beat starts."""
        return {name: entry for name, entry in self.entries.items() if entry.enabled}

    @property
    def digest(self) -> str:
        """The same for all beats and workers of a deployment, as long as they have one file and one timezone."""
        entries = {name: (one.crontab, one.job.name, params.to_json(one.job)) for name, one in self.enabled.items()}
        return canonical.digest({"timezone": self.timezone, "entries": entries})

    def on(self, layout: Layout) -> Timetable:
        """The same, with the entries off that are for another layout."""
        entries = {
            name: entry if entry.layout in {None, layout.name} else replace(entry, enabled=False)
            for name, entry in self.entries.items()
        }
        return replace(self, entries=entries)

    def entry(self, name: str) -> Entry:
        """The entry beat has called for. Refused when this process's schedule does not start it."""
        if found := self.enabled.get(name):
            return found
        raise Refused(f"the schedule has no entry {name}, or has it switched off; beat and workers need one schedule")

    def due_times(self, crontab: str, after: datetime) -> Iterator[datetime]:
        """When a crontab is due after that moment, in UTC, without end."""
        app = Celery(set_as_current=False)
        app.conf.update(timezone=self.timezone)
        schedule = cron(crontab, app)
        while True:
            # Celery counts in the crontab's own timezone: so do the days on which clocks are put forward or back.
            start, step, _ = schedule.remaining_delta(after)
            after = (start + step).astimezone(UTC)
            yield after

    def missed(self, crontab: str, after: datetime, until: datetime) -> int:
        """How many due times lie between the two moments; at most MOST_MISSED."""
        for number, due in enumerate(self.due_times(crontab, after)):
            if due > until or number == MOST_MISSED:
                return number
        raise TypeError("a crontab is due without end")


def cron(text: str, app: Celery | None = None) -> crontab:
    """A five-field crontab as Celery's own. ValueError when it is none, or never due."""
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"has {len(fields)} fields, not the five of minute hour day-of-month month day-of-week")
    for (name, range_), field in zip(_FIELDS.items(), fields, strict=True):
        try:
            crontab(**{name: field})
        except (ValueError, ParseException):
            raise ValueError(
                f"{name.replace('_', '-')} {field!r} is not of {range_}, as *, */n, a-b, a-b/n or a,b"
            ) from None
    try:
        return crontab(**dict(zip(_FIELDS, fields, strict=True)), app=app)
    except ValueError:
        raise ValueError("names a day that no month has") from None


def load(settings: Settings) -> Timetable:
    """The schedule of these settings. SettingsError with every fault of the file in one line, each with its key."""
    entries = dict(schedules.SCHEDULE)
    if settings.schedule_file is not None:
        entries = _merged(entries, settings.schedule_file)
    return Timetable(timezone=settings.timezone, entries=entries)


def of(deployment: Operations) -> Timetable:
    """The schedule of this deployment, as its settings and its layout have it. Raises as `load` and SchemaError."""
    times = load(deployment.settings)
    with deployment.transaction(read_only=True) as connection:
        return times.on(layouts.detect(connection))


class _Override(BaseModel, extra="forbid", strict=True):
    """An entry as the file writes it; what it leaves out stays as it is."""

    job: str | None = None
    crontab: str | None = None
    enabled: bool | None = None
    params: dict[str, Any] = {}


class _File(BaseModel, extra="forbid", strict=True):
    entry: dict[str, dict[str, Any]] = {}


def _merged(entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """The entries with what the file changes and adds."""
    found, faults = dict(entries), list[str]()
    for name, raw in _valid(_File, _toml(file), "", faults).entry.items():
        override = _valid(_Override, raw, f"entry.{name}.", faults)
        reader = _Reader(f"entry.{name}", entries.get(name), override)
        if entry := reader.entry(name):
            found[name] = entry
        faults += reader.faults
    if faults:
        raise _wrong(file, faults)
    return found


class _Reader:
    """Makes one entry of what the file says, and notes every fault with its key."""

    def __init__(self, place: str, known: Entry | None, override: _Override) -> None:
        self.faults: list[str] = []
        self._place = place
        self._known = known
        self._override = override

    def entry(self, name: str) -> Entry | None:
        """The entry; None when there are faults."""
        if not _NAME.fullmatch(name) or name in {RESCUE, MEASURE}:
            self._fault(
                "", "is no name for an entry: small letters, digits and dashes, and neither rescue nor measure"
            )
        crontab, kind = self._crontab(), self._kind()
        job = self._job(kind) if kind else None
        if self.faults or job is None or crontab is None:
            return None
        enabled = self._override.enabled
        if enabled is None:
            enabled = self._known.enabled if self._known else True
        # What an operator gives parameters is the operator's, whatever layout it was for before.
        layout = self._known.layout if self._known and not self._override.params else None
        return Entry(crontab, job, enabled, layout)

    def _crontab(self) -> str | None:
        text = self._override.crontab
        if text is None:
            if self._known:
                return self._known.crontab
            if self._override.job is not None:
                self._fault("crontab", "is required for an entry that is added")
            return None
        try:
            cron(text)
        except ValueError as error:
            self._fault("crontab", str(error))
        return text

    def _kind(self) -> type[Job] | None:
        name, known = self._override.job, self._known
        if name is None:
            if known is None:
                self._fault("", f"is no entry there is ({', '.join(schedules.SCHEDULE)}); to add one, give it a job")
            return type(known.job) if known else None
        try:
            kind = registry.job(name)
        except Refused as error:
            self._fault("job", str(error))
            return None
        if known and name != known.job.name:
            self._fault("job", f"is {known.job.name} for this entry; switch it off and add one of another name")
        return kind

    def _job(self, kind: type[Job]) -> Job | None:
        given, items = self._override.params, {item.name: item for item in params.params_of(kind)}
        before = len(self.faults)
        for name, value in given.items():
            try:
                params.read_field(items[name], value)
            except KeyError:
                self._fault(f"params.{name}", f"is no parameter of {kind.name}: {', '.join(items)}")
            except Refused as error:
                self._fault(f"params.{name}", str(error))
        known = params.to_json(self._known.job) if self._known else {}
        for name, item in items.items():
            if item.default is MISSING and name not in known | given:
                self._fault(f"params.{name}", f"is required by {kind.name}")
        if len(self.faults) > before:
            return None
        try:
            return params.from_json(kind, known | given)
        except Refused as error:
            self._fault("params", str(error))
            return None

    def _fault(self, key: str, what: str) -> None:
        self.faults.append(f"{self._place}{key and '.'}{key}: {what}")


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise _wrong(file, [f"is not TOML: {error}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(file, [f"cannot be read: {type(error).__name__}"]) from error


def _valid(model: type[M], raw: dict[str, Any], place: str, faults: list[str]) -> M:
    """The model of these values; of a key that does not fit a fault is noted, and it is left out."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False)
    for item in items:
        what = "is not a known key" if item["type"] == "extra_forbidden" else item["msg"]
        faults.append(f"{place}{'.'.join(map(str, item['loc']))}: {what[0].lower()}{what[1:]}")
    wrong = {item["loc"][0] for item in items}
    return model.model_validate({key: value for key, value in raw.items() if key not in wrong})


def _wrong(file: Path, faults: list[str]) -> SettingsError:
    return SettingsError(f"PAPERCLIP_WORKER_SCHEDULE_FILE {file.name}: " + "; ".join(faults))
