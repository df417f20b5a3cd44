"""One tree of errors; each knows the exit code an operator's script sees (design.md rule 11)."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What a command's exit status means."""

    KEPT = 0
    UNKEPT = 1
    REFUSED = 2
    UNDER_WAY = 3


class WorkerError(Exception):
    """Base of every error this project raises on purpose: one sentence that says what to do next."""

    exit_code: Exit = Exit.UNKEPT


class Refused(WorkerError):
    """Misuse, or a guard said no. Nothing was changed."""

    exit_code = Exit.REFUSED


class Interrupted(WorkerError):
    """An operator cut a run off within a bite, which is rolled back; what was done before it stays done."""


class UnderWay(WorkerError):
    """The same work is already being done by another run."""

    exit_code = Exit.UNDER_WAY


class SettingsError(Refused):
    """One or more settings are missing or wrong; the message names all of them at once."""


class Denied(Refused):
    """The database role lacks a privilege."""


class SchemaError(Refused):
    """The live database lacks something that is needed, or no layout describes it."""


class LedgerMissing(Refused):
    """The ledger schema is absent or older than this release."""


class Transient(WorkerError):
    """A fault outside that usually passes: a bite is rolled back and taken again.

    A command that meets it before there is a run has changed nothing.
    """

    exit_code = Exit.REFUSED


class Contended(Transient):
    """Another transaction holds or has just changed rows of this bite."""


class DatabaseGone(Transient):
    """The database cannot be reached, or ended our connection."""


class Unheard(DatabaseGone):
    """The connection ended while a change was committed: it was made or not, and nobody has heard which."""

    exit_code = Exit.UNKEPT


class Waits(Transient):
    """A run can only go on when somebody outside has done something; the message says what."""


class StorageFault(Transient):
    """The object store refused, did not answer, or answered with other bytes than were written."""


class NoRoom(Transient):
    """The disk does not take a temporary file; a smaller one it may."""


class ArchiveTampered(Refused):
    """An archive object is missing or does not hold the bytes that were written."""


class AnchorTampered(WorkerError):
    """The bucket holds something else under the name of a receipt or a head."""
