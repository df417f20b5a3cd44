"""Settings: read once from the environment, every fault reported at once, secrets never printed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from worker import urls
from worker.errors import Refused, SettingsError
from worker.params import duration, is_text

OUR_PREFIX = "PAPERCLIP_WORKER_"
_LONGEST = timedelta(days=36_500)  # of a lock S3's own bound
# Read by worker/embedded.py, which runs where no Settings exist yet.
_NOT_SETTINGS = frozenset({"PAPERCLIP_WORKER_EMBEDDED_PG_BIN"})
# Where Celery finds one of these it goes there, whatever it was told.
_CELERYS_OWN = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")
# A variable that names a file, and the secret setting that the file's one line is.
FROM_FILE = {f"{name}_FILE": name for name in ("DATABASE_URL", "PAPERCLIP_WORKER_BROKER_URL")}


class Need(StrEnum):
    """What a command cannot do without; `load` refuses when it is not configured."""

    DATABASE = "DATABASE_URL"
    BROKER = "PAPERCLIP_WORKER_BROKER_URL"
    STORAGE = "PAPERCLIP_WORKER_S3_BUCKET"
    SIGNING = "PAPERCLIP_WORKER_SIGNING_KEY_FILE"


def _env(*names: str) -> Any:
    return AliasChoices(*names)


def _duration(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return duration(value)
    except Refused:
        # Its sentence quotes the text, which somebody may have meant for another variable.
        raise ValueError("is not a duration above zero such as 90d, 12h, 30m or 2w") from None


Duration = Annotated[timedelta, BeforeValidator(_duration)]


class Settings(BaseModel):
    """Everything an operator can set, frozen. Names are the app's own where the meaning is the same."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(None, validation_alias=_env("DATABASE_URL"))
    broker_url: SecretStr | None = Field(None, validation_alias=_env("PAPERCLIP_WORKER_BROKER_URL"))

    s3_bucket: str | None = Field(
        None, validation_alias=_env("PAPERCLIP_WORKER_S3_BUCKET", "PAPERCLIP_STORAGE_S3_BUCKET")
    )
    s3_prefix: str = Field("paperclip-worker/", validation_alias=_env("PAPERCLIP_WORKER_S3_PREFIX"))
    s3_region: str | None = Field(None, validation_alias=_env("PAPERCLIP_STORAGE_S3_REGION"))
    s3_endpoint: str | None = Field(None, validation_alias=_env("PAPERCLIP_STORAGE_S3_ENDPOINT"))
    s3_force_path_style: bool = Field(False, validation_alias=_env("PAPERCLIP_STORAGE_S3_FORCE_PATH_STYLE"))
    app_s3_bucket: str | None = Field(None, validation_alias=_env("PAPERCLIP_STORAGE_S3_BUCKET"))
    app_s3_prefix: str = Field("", validation_alias=_env("PAPERCLIP_STORAGE_S3_PREFIX"))

    signing_key_file: Path | None = Field(None, validation_alias=_env("PAPERCLIP_WORKER_SIGNING_KEY_FILE"))
    receipt_lock_mode: Literal["governance", "compliance"] = Field(
        "governance", validation_alias=_env("PAPERCLIP_WORKER_RECEIPT_LOCK_MODE")
    )
    receipt_lock: Duration = Field(timedelta(days=2555), validation_alias=_env("PAPERCLIP_WORKER_RECEIPT_LOCK"))
    catalogue_file: Path | None = Field(None, validation_alias=_env("PAPERCLIP_WORKER_CATALOGUE_FILE"))

    # The app's own; worker/keyring.py reads them as the server does, so they are kept as given.
    secrets_master_key: SecretStr | None = Field(None, validation_alias=_env("PAPERCLIP_SECRETS_MASTER_KEY"))
    secrets_master_key_file: str | None = Field(None, validation_alias=_env("PAPERCLIP_SECRETS_MASTER_KEY_FILE"))
    paperclip_home: str | None = Field(None, validation_alias=_env("PAPERCLIP_HOME"))
    paperclip_instance_id: str = Field(
        "default", pattern=r"^[A-Za-z0-9_-]+$", validation_alias=_env("PAPERCLIP_INSTANCE_ID")
    )
    paperclip_config: str | None = Field(None, validation_alias=_env("PAPERCLIP_CONFIG"))

    bite_seconds: Annotated[float, Field(ge=0.005, le=5)] = Field(
        0.04, validation_alias=_env("PAPERCLIP_WORKER_BITE_SECONDS")
    )
    bite_rows: Annotated[int, Field(ge=1, le=100_000)] = Field(
        20_000, validation_alias=_env("PAPERCLIP_WORKER_BITE_ROWS")
    )
    lock_timeout: Annotated[float, Field(gt=0, le=60)] = Field(
        0.2, validation_alias=_env("PAPERCLIP_WORKER_LOCK_TIMEOUT")
    )
    statement_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        30, validation_alias=_env("PAPERCLIP_WORKER_STATEMENT_TIMEOUT")
    )
    scan_timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
        3600, validation_alias=_env("PAPERCLIP_WORKER_SCAN_TIMEOUT")
    )
    slice_seconds: Annotated[float, Field(gt=0, le=240)] = Field(
        60, validation_alias=_env("PAPERCLIP_WORKER_SLICE_SECONDS")
    )
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(2, validation_alias=_env("PAPERCLIP_WORKER_PARALLEL"))
    max_replica_lag: Annotated[float, Field(gt=0)] = Field(
        10, validation_alias=_env("PAPERCLIP_WORKER_MAX_REPLICA_LAG")
    )
    max_retained_wal: Annotated[int, Field(gt=0)] = Field(
        4 << 30, validation_alias=_env("PAPERCLIP_WORKER_MAX_RETAINED_WAL")
    )
    rescue_after: Annotated[float, Field(ge=1, le=86_400)] = Field(
        180, validation_alias=_env("PAPERCLIP_WORKER_RESCUE_AFTER")
    )
    retention_floor: Duration | None = Field(None, validation_alias=_env("PAPERCLIP_WORKER_RETENTION_FLOOR"))
    retention_ceiling: Duration = Field(
        timedelta(days=36_500), validation_alias=_env("PAPERCLIP_WORKER_RETENTION_CEILING")
    )
    metrics_port: Annotated[int, Field(ge=1, le=65_535)] | None = Field(
        None, validation_alias=_env("PAPERCLIP_WORKER_METRICS_PORT")
    )
    backlog_every: Annotated[int, Field(ge=0, le=86_400)] = Field(
        900, validation_alias=_env("PAPERCLIP_WORKER_BACKLOG_EVERY")
    )

    timezone: str = Field("UTC", validation_alias=_env("PAPERCLIP_WORKER_TIMEZONE"))
    schedule_file: Path | None = Field(None, validation_alias=_env("PAPERCLIP_WORKER_SCHEDULE_FILE"))
    beat_seconds: Annotated[int, Field(ge=1, le=300)] = Field(
        30, validation_alias=_env("PAPERCLIP_WORKER_BEAT_SECONDS")
    )

    @field_validator("database_url")
    @classmethod
    def _a_postgres_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            urls.require_postgres(value.get_secret_value())
        return value

    @field_validator("broker_url")
    @classmethod
    def _a_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            urls.require_redis(value.get_secret_value())
        return value

    @field_validator("s3_endpoint")
    @classmethod
    def _an_http_url(cls, value: str | None) -> str | None:
        if value is not None:
            urls.require_http(value)
        return value

    @field_validator("receipt_lock", "retention_ceiling")
    @classmethod
    def _a_century_at_most(cls, value: timedelta) -> timedelta:
        if value > _LONGEST:
            raise ValueError("must not be longer than 100 years (36500d)")
        return value

    @field_validator("s3_prefix")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        folder = value.strip("/")
        if not folder or any(part in {"", ".", ".."} for part in folder.split("/")):
            raise ValueError("must name a folder of the worker's own, such as paperclip-worker/")
        return folder + "/"

    @field_validator("timezone")
    @classmethod
    def _a_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, ZoneInfoNotFoundError):
            raise ValueError("must be the IANA name of a timezone, such as UTC or Europe/Berlin") from None
        return value

    @field_validator("signing_key_file", "catalogue_file", "schedule_file")
    @classmethod
    def _a_file(cls, value: Path | None) -> Path | None:
        try:
            found = value is None or value.is_file()
        except OSError:
            # A directory that may not be entered, a name too long.
            found = False
        if not found:
            raise ValueError("names no file that can be read")
        return value

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> Settings:
        if self.retention_floor is not None and self.retention_floor > self.retention_ceiling:
            raise ValueError("PAPERCLIP_WORKER_RETENTION_FLOOR is over PAPERCLIP_WORKER_RETENTION_CEILING")
        return self

    @model_validator(mode="after")
    def _apart_from_the_app(self) -> Settings:
        app = self.app_s3_prefix.strip("/")
        if app and self.s3_bucket == self.app_s3_bucket and f"{app}/".startswith(self.s3_prefix):
            raise ValueError(
                "PAPERCLIP_WORKER_S3_PREFIX holds the app's own PAPERCLIP_STORAGE_S3_PREFIX; choose another"
            )
        return self

    def database(self) -> str:
        """The libpq URL. Refused when it was not configured (callers name `Need.DATABASE`)."""
        return _given(self.database_url, Need.DATABASE)

    def broker(self) -> str:
        """The broker's URL. Refused when it was not configured."""
        return _given(self.broker_url, Need.BROKER)


def _given(value: SecretStr | None, need: Need) -> str:
    if value is None:
        raise SettingsError(f"{need.value} is not set")
    return value.get_secret_value()


# The variables by any of which a need is met.
_GIVEN_BY = {
    Need.DATABASE: ("DATABASE_URL", "DATABASE_URL_FILE"),
    Need.BROKER: ("PAPERCLIP_WORKER_BROKER_URL", "PAPERCLIP_WORKER_BROKER_URL_FILE"),
    Need.STORAGE: ("PAPERCLIP_WORKER_S3_BUCKET", "PAPERCLIP_STORAGE_S3_BUCKET"),
    Need.SIGNING: ("PAPERCLIP_WORKER_SIGNING_KEY_FILE",),
}


def load(environ: Mapping[str, str] | None = None, *, needs: Iterable[Need] = ()) -> Settings:
    """Settings from `environ` (default: the process's own).

    Raises SettingsError naming every missing, malformed and misspelt variable in one line, and no value.
    """
    environ, needs = os.environ if environ is None else environ, tuple(needs)
    known = _names()
    faults = [
        f"{name} is not a setting of paperclip-worker"
        for name in sorted(environ)
        if name.startswith(OUR_PREFIX) and name not in known | _NOT_SETTINGS
    ]
    given: dict[str, Any] = {name: environ[name] for name in known if environ.get(name)}
    for name in sorted(given):
        if not is_text(given[name]):
            faults.append(f"{name} is not UTF-8")
            del given[name]
    faults += _read_files(given)
    settings = None
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        faults += [_fault(dict(item)) for item in error.errors(include_url=False, include_context=False)]
    faults += [f"{need.value} is not set" for need in needs if not any(environ.get(n) for n in _GIVEN_BY[need])]
    if Need.BROKER in needs:
        faults += [
            f"{name} would send Celery to another broker; unset it" for name in _CELERYS_OWN if environ.get(name)
        ]
    if faults or settings is None:
        raise SettingsError("settings: " + "; ".join(faults))
    return settings


def _read_files(given: dict[str, Any]) -> list[str]:
    """Put the line of each file that `given` names in its setting's place; what is wrong with the files."""
    faults = []
    for variable, name in FROM_FILE.items():
        path = given.pop(variable, None)
        if path is None:
            continue
        if name in given:
            faults.append(f"{name} and {variable} are both set; keep one")
            continue
        try:
            line = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError):
            faults.append(f"{variable} names no file of text that can be read")
            continue
        if line and line.isprintable():
            given[name] = line
        else:
            faults.append(f"{variable} must name a file that holds one line")
    return faults


def _names() -> frozenset[str]:
    return frozenset(FROM_FILE) | frozenset(
        str(choice)
        for field in Settings.model_fields.values()
        if isinstance(field.validation_alias, AliasChoices)
        for choice in field.validation_alias.choices
    )


def _fault(item: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in item["loc"])
    return f"{where} {message[0].lower()}{message[1:]}" if where else message
