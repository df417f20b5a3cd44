"""What of PostgreSQL no library of ours knows: places of rows, numbers of transactions, many places at once."""

from __future__ import annotations

import struct
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy.types import UserDefinedType


class Tid(UserDefinedType[str]):
    """PostgreSQL's row address `(block,offset)`; comparisons on it become TID range scans."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "tid"


class Xid(UserDefinedType[str]):
    """The number of the transaction that wrote a row; it wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


class Xid8(UserDefinedType[str]):
    """A transaction's number that never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


def of(table: sa.Table, column: sa.ColumnClause[Any]) -> sa.ColumnClause[Any]:
    """This column of a table, which its description does not have: one of the server's, or one we do not know."""
    return sa.column(column.name, column.type, _selectable=table)


def quoted(name: str) -> str:
    """A name of the host's in quotes. SQLAlchemy's own doubles each %, also where it or nobody does so once more."""
    return '"' + name.replace('"', '""') + '"'


class Tids:
    """A tid[] as PostgreSQL sends it, put together from several; a parameter of a statement."""

    # Dimensions, nulls, the type of the elements; then of the one dimension its length and first index.
    _HEAD = struct.Struct("!iiIii")
    # The length of an element, its block and its place there.
    _PLACE = struct.Struct("!iIH")
    _OID = 27

    def __init__(self) -> None:
        self.number, self._parts = 0, list[bytes]()

    def add(self, array: bytes, number: int) -> None:
        """So many more addresses, as a tid[] in binary form."""
        self.number += number
        self._parts.append(array[self._HEAD.size :])

    def join(self, others: Tids) -> None:
        """The addresses of others as well."""
        self.number += others.number
        self._parts += others._parts

    def __bytes__(self) -> bytes:
        head = self._HEAD.pack(1 if self.number else 0, 0, self._OID, self.number, 1)
        return b"".join([head if self.number else head[:12], *self._parts])

    def __str__(self) -> str:
        places = self._PLACE.iter_unpack(b"".join(self._parts))
        return "{" + ",".join(f'"({block},{row})"' for _, block, row in places) + "}"


class _TidsDumper(Dumper):
    format = Format.BINARY
    oid = 1010

    def dump(self, obj: Tids) -> bytes:
        return bytes(obj)


class _TidsText(Dumper):
    """For COPY, which takes no parameters: they become part of its text."""

    oid = 1010

    def dump(self, obj: Tids) -> bytes:
        return str(obj).encode()


def register(connection: psycopg.Connection[Any]) -> None:
    """Let a connection take `Tids` as a parameter."""
    for dumper in (_TidsText, _TidsDumper):
        connection.adapters.register_dumper(Tids, dumper)
