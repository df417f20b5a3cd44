"""A job's fields <-> click options, Celery kwargs and the ledger's JSON: one description of each parameter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints
from uuid import UUID

from worker.errors import Refused

if TYPE_CHECKING:
    from worker.job import Job

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,6})([mhdw])")


class RunId(UUID):
    """The id of a run. On the command line its start, or `last`, will do."""


def param(default: Any = dataclasses.MISSING, *, help: str, metavar: str = "", off: str = "") -> Any:  # noqa: A002
    """Declare a job's field: its default, what `--help` says, and for a switch the option that turns it off."""
    meta = {"help": help, "metavar": metavar, "off": off}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a job, as every front needs it."""

    name: str
    type: type
    many: bool
    optional: bool
    default: Any
    help: str
    metavar: str
    off: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def params_of(job: type[Job]) -> tuple[Param, ...]:
    """The parameters of a job class, in the order they are declared."""
    hints = get_type_hints(job, include_extras=False)
    return tuple(_param(field, hints[field.name]) for field in dataclasses.fields(job))  # type: ignore[arg-type]  # every job is a dataclass


def _param(field: dataclasses.Field[Any], hint: Any) -> Param:
    many = get_origin(hint) is tuple
    optional = get_origin(hint) is UnionType
    kind = get_args(hint)[0] if many or optional else hint
    if kind not in _READ or (optional and get_args(hint) != (kind, NoneType)):
        raise TypeError(f"{field.name}: a job parameter cannot be of type {hint!r}")
    return Param(
        name=field.name,
        type=kind,
        many=many,
        optional=optional,
        default=field.default,
        help=field.metadata["help"],
        metavar=field.metadata["metavar"],
        off=field.metadata["off"],
    )


def is_text(value: str) -> bool:
    """Whether what the operating system gave us is text: Python smuggles bytes that are not as lone surrogates."""
    return not any("\ud800" <= one <= "\udfff" for one in value)


def duration(text: str) -> timedelta:
    """`90d`, `12h`, `30m` or `2w` as a timedelta. Refused when it is not such a text, or is zero."""
    # A file or a ledger row may hold any JSON value here.
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if not match or not int(match[1]):
        raise Refused(f"{text!r} is not a duration above zero such as 90d, 12h, 30m or 2w")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def duration_text(value: timedelta) -> str:
    """The shortest text that `duration` reads back as the same value."""
    seconds = round(value.total_seconds())
    for unit in ("d", "h", "m"):
        if seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    raise Refused("a duration must be whole minutes")


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except (ValueError, AttributeError, TypeError):
        raise Refused(f"{text!r} is not an id (a UUID)") from None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{value!r} is not true or false")
    return value


def _int(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refused(f"{value!r} is not a whole number, zero or above")
    return value


_READ: Mapping[Any, Any] = {
    timedelta: duration,
    UUID: _uuid,
    RunId: lambda text: RunId(str(_uuid(text))),
    str: str,
    bool: _bool,
    int: _int,
}
_WRITE: Mapping[Any, Any] = {timedelta: duration_text, UUID: str, RunId: str}


def read(kind: type, value: Any) -> Any:
    """One value from its text (or JSON) form. Refused when it does not have that form."""
    return _READ[kind](value)


def read_field(item: Param, value: Any) -> Any:
    """A parameter's value from its JSON form. Refused when it does not have that form."""
    if value is None and item.optional:
        return None
    if item.many is not isinstance(value, list):
        raise Refused("must be a list" if item.many else "must be one value, not a list")
    return tuple(read(item.type, one) for one in value) if item.many else read(item.type, value)


def to_json(job: Job) -> dict[str, Any]:
    """A job's parameters as JSON values, every one named, so that a later default cannot change an old run."""
    found: dict[str, Any] = {}
    for item in params_of(type(job)):
        value = getattr(job, item.name)
        write = _WRITE.get(item.type, lambda plain: plain)
        found[item.name] = [write(one) for one in value] if item.many else None if value is None else write(value)
    return found


def from_json(job: type[Job], values: Mapping[str, Any]) -> Job:
    """The job with these parameters. Refused naming the parameter that is unknown or does not fit."""
    known = {item.name: item for item in params_of(job)}
    if unknown := sorted(set(values) - set(known)):
        raise Refused(f"{job.name} has no parameter {', '.join(unknown)}")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        try:
            fields[name] = read_field(known[name], value)
        except Refused as error:
            raise Refused(f"{known[name].option}: {error}") from None
    return job(**fields)
