"""The object store: the only importer of boto3. Every fault of it becomes one of our errors."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Protocol

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    InvalidRegionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from worker.errors import Refused, StorageFault
from worker.params import is_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef

    from worker.config import Settings

CHUNK = 1 << 20
# A receipt names each company with what went and what stayed: of 20,000 it takes some megabytes. An object that is
# larger would only be there to fill our memory.
LARGEST = 64 << 20
# Up to this size one PUT carries its own checksum; beyond it parts do.
_ONE_PUT = 32 << 20
_FINAL = frozenset({"AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "404"})
_GONE = frozenset({"NoSuchKey", "NoSuchVersion"})
# What the client says before it asks the store: no fault that passes.
_MISTAKEN: dict[type[BotoCoreError], str] = {
    ParamValidationError: "PAPERCLIP_WORKER_S3_BUCKET or PAPERCLIP_STORAGE_S3_BUCKET is not the name of a bucket",
    InvalidRegionError: "PAPERCLIP_STORAGE_S3_REGION is not the name of a region",
    ProfileNotFound: "AWS_PROFILE names no profile of the AWS configuration files",
    ConfigParseError: "AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE is not a file of AWS configuration",
    ConfigNotFound: "AWS_CONFIG_FILE names no file that can be read",
}
# An object of that name is there, or another writer is just putting it there.
_THERE = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412"})
# Answers to the question for Object Lock that mean there is none; so do a 404, 405 or 501.
_LOCKLESS = frozenset({"InvalidRequest", "InvalidBucketState", "NoSuchObjectLockConfiguration", "NotImplemented"})


@dataclass(frozen=True, kw_only=True)
class Lock:
    """Object Lock retention to put an object under: `governance` or `compliance`, and its end."""

    mode: str
    until: datetime


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An object as the store gives it back, and the retention that the store confirms."""

    body: bytes
    locked_until: datetime | None


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of an object. Size in bytes."""

    id: str
    size: int


@dataclass(frozen=True, kw_only=True)
class History:
    """All a bucket holds under one name: versions, the oldest first, and whether it was ever deleted."""

    key: str
    versions: tuple[Version, ...]
    deleted: bool

    @property
    def size(self) -> int:
        """Bytes of all its versions."""
        return sum(version.size for version in self.versions)


class Store(Protocol):
    """Where archives go. Keys are relative to the worker's own prefix."""

    def put(self, key: str, body: IO[bytes], *, sha256: str) -> None:
        """Write an object whole or not at all; `sha256` (hex) is of the body."""

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes, as the store has them now, in chunks."""

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix."""

    def delete(self, keys: list[str]) -> None:
        """Remove objects; those that are gone already are no error."""


class S3Store:
    """Objects in the deployment's bucket under the worker's prefix.

    Raises StorageFault for what may pass and Refused for what an operator must change (bucket, credentials).
    """

    def __init__(self, settings: Settings) -> None:
        if settings.s3_bucket is None:
            raise Refused("PAPERCLIP_WORKER_S3_BUCKET is not set")
        # The client takes credentials as they are, and breaks over them at each request.
        if bad := sorted(name for name, text in os.environ.items() if name.startswith("AWS_") and not is_text(text)):
            raise Refused(f"{', '.join(bad)}: not UTF-8")
        self._bucket = settings.s3_bucket
        self._prefix = settings.s3_prefix
        with _translated(self._bucket):
            self._client: S3Client = boto3.session.Session().client(
                "s3",
                endpoint_url=settings.s3_endpoint,
                region_name=settings.s3_region or "us-east-1",
                config=Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if settings.s3_force_path_style else "auto"},
                    connect_timeout=5,
                    read_timeout=30,
                    retries={"mode": "standard", "max_attempts": 3},
                    user_agent_extra="paperclip-worker",
                ),
            )
        # Two parts at a time: with ten, retries of a faulty network used up their quota (embedded.md §6).
        self._transfer = TransferConfig(multipart_threshold=_ONE_PUT, multipart_chunksize=8 << 20, max_concurrency=2)

    @property
    def location(self) -> str:
        """The prefix as a URL an operator recognises."""
        return f"s3://{self._bucket}/{self._prefix}"

    def check(self) -> None:
        """Raise Refused or StorageFault when the bucket cannot be used at all."""
        with _translated(self._bucket):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def put(self, key: str, body: IO[bytes], *, sha256: str) -> None:
        size = body.seek(0, 2)
        body.seek(0)
        with _translated(self._bucket):
            if size <= _ONE_PUT:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + key,
                    Body=body,
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(sha256)).decode(),
                    Metadata={"sha256": sha256},
                )
            else:
                self._client.upload_fileobj(
                    body,
                    self._bucket,
                    self._prefix + key,
                    ExtraArgs={"Metadata": {"sha256": sha256}, "ChecksumAlgorithm": "SHA256"},
                    Config=self._transfer,
                )

    def read(self, key: str) -> Iterator[bytes]:
        with _translated(self._bucket):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            yield from answer["Body"].iter_chunks(CHUNK)

    def keys(self, prefix: str) -> list[str]:
        found: list[str] = []
        with _translated(self._bucket):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                found += [item["Key"].removeprefix(self._prefix) for item in page.get("Contents", [])]
        return found

    def put_once(self, key: str, body: bytes, *, lock: Lock | None) -> None:
        """Write a small object unless one of that name is there; which of the two it was is for `get` to show."""
        retention = {"ObjectLockMode": lock.mode.upper(), "ObjectLockRetainUntilDate": lock.until} if lock else {}
        with _translated(self._bucket):
            try:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + key,
                    Body=body,
                    IfNoneMatch="*",
                    ChecksumSHA256=base64.b64encode(hashlib.sha256(body).digest()).decode(),
                    **retention,  # type: ignore[arg-type]
                )
            except ClientError as error:
                if _code(error) not in _THERE:
                    raise

    def get(self, key: str, *, version: str | None = None) -> Stored:
        """A small object whole; one of its versions, or the newest. Raises Missing or TooLarge."""
        which = {"VersionId": version} if version else {}
        with _translated(self._bucket):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **which)  # type: ignore[arg-type]
            if answer["ContentLength"] > LARGEST:
                answer["Body"].close()
                raise TooLarge(f"bucket {self._bucket}: {key} is larger than a receipt can be")
            until = answer.get("ObjectLockRetainUntilDate")
            return Stored(body=answer["Body"].read(), locked_until=until.astimezone(UTC) if until else None)

    def lockable(self) -> bool:
        """Whether the bucket has Object Lock. Refused when the credentials may not know."""
        with _translated(self._bucket):
            try:
                answer = self._client.get_object_lock_configuration(Bucket=self._bucket)
            except ClientError as error:
                code, status = _code(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
                if code == "AccessDenied":
                    raise Refused(
                        f"bucket {self._bucket}: the credentials may not ask whether it has Object Lock; "
                        "grant s3:GetBucketObjectLockConfiguration"
                    ) from error
                if code in _LOCKLESS or (status in {404, 405, 501} and code != "NoSuchBucket"):
                    return False
                raise
        return answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled"

    def history(self, prefix: str) -> Iterator[History]:
        """What is and was below a prefix, by name. A deleted object whose versions are kept is among them."""
        before = ""
        for key, entries in itertools.groupby(self._entries(prefix), key=lambda one: one[0]):
            if key < before:
                raise StorageFault(f"bucket {self._bucket}: the store does not list by name")
            before = key
            versions = [version for _, version in entries]
            kept = tuple(version for version in reversed(versions) if version is not None)
            yield History(key=key.removeprefix(self._prefix), versions=kept, deleted=None in versions)

    def _entries(self, prefix: str) -> Iterator[tuple[str, Version | None]]:
        """Names with each version, the newest first; None stands for a delete marker."""
        with _translated(self._bucket):
            pages = self._client.get_paginator("list_object_versions").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                found: list[tuple[str, Version | None]] = [
                    (item["Key"], Version(id=item["VersionId"], size=item["Size"]))
                    for item in page.get("Versions", [])
                ]
                found += [(item["Key"], None) for item in page.get("DeleteMarkers", [])]
                yield from sorted(found, key=lambda one: one[0])

    def delete(self, keys: list[str]) -> None:
        with _translated(self._bucket):
            for first in range(0, len(keys), 1000):
                batch: list[ObjectIdentifierTypeDef] = [
                    {"Key": self._prefix + key} for key in keys[first : first + 1000]
                ]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
                if answer.get("Errors"):
                    raise Refused(f"bucket {self._bucket}: the credentials may not delete objects")


class Missing(StorageFault):
    """The object is not in the store."""


class TooLarge(StorageFault):
    """The object is none of the small ones that are read whole."""


def read_digest(store: Store, key: str) -> str | None:
    """SHA-256 (hex) of the object's bytes as they are in the store now; None when it is not there."""
    found = hashlib.sha256()
    try:
        for chunk in store.read(key):
            found.update(chunk)
    except Missing:
        return None
    return found.hexdigest()


@contextmanager
def _translated(bucket: str) -> Iterator[None]:
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise Refused(f"bucket {bucket}: no S3 credentials; set AWS_ACCESS_KEY_ID or a profile") from error
    except ClientError as error:
        code = _code(error)
        if code in _GONE:
            raise Missing(f"bucket {bucket}: an object is not there") from error
        if code in _FINAL:
            raise Refused(f"bucket {bucket}: the store refuses ({code}); check bucket and credentials") from error
        raise StorageFault(f"bucket {bucket}: the store answers {code}") from error
    except BotoCoreError as error:
        for kind, says in _MISTAKEN.items():
            if isinstance(error, kind):
                raise Refused(says) from error
        raise StorageFault(f"bucket {bucket}: cannot be reached ({type(error).__name__})") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))
