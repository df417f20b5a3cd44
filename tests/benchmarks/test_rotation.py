"""rotate-master-key against the limits: one giant UPDATE of precomputed values, loops in Python and in Node.

Read the ratios. Set PAPERCLIP_WORKER_BENCH_VERSIONS for another number of secret versions than 200,000.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects.postgresql import JSONB

from tests.benchmarks import bench
from tests.conftest import NOW
from worker import keyring
from worker.envelopes import LocalEncrypted

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(7200)]

VERSIONS = int(os.environ.get("BENCH_VERSIONS", "200000"))
OLD, NEW = keyring.MasterKey(b"o" * 32), keyring.MasterKey(b"n" * 32)
# A loop that commits each row is timed on so many of them.
FEW = 5_000
_COPY = (
    "COPY company_secret_versions (id, secret_id, version, material, value_sha256, fingerprint_sha256, status, "
    "created_at) FROM STDIN"
)


def fill(url: str) -> None:
    """Secret versions of 100 bytes, eight of each secret, as the app leaves them."""
    codec = LocalEncrypted(OLD.raw)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO company_secrets (id, company_id, name, key, created_at, updated_at)
            SELECT gen_random_uuid(), c.id, 'b' || g || c.id, 'b' || g || c.id, now(), now()
            FROM companies c, generate_series(1, %s) g
            """,
            (VERSIONS // 64 + 1,),
        )
        secrets = [
            r[0] for r in connection.execute("SELECT id FROM company_secrets WHERE name LIKE 'b%' ORDER BY id")
        ]
        with connection.cursor().copy(_COPY) as copy:
            for number in range(VERSIONS):
                value = f"sk-live-{number:092d}".encode()
                digest = hashlib.sha256(value).hexdigest()
                row = uuid.UUID(bytes=hashlib.blake2b(b"%d" % number, digest_size=16).digest())
                secret = secrets[number // 8 % len(secrets)]
                version, status = (
                    number % 8 + 8 * (number // 8 // len(secrets)),
                    "current" if number % 8 == 7 else "previous",
                )
                copy.write_row((row, secret, version, json.dumps(codec.seal(value)), digest, digest, status, NOW))
        connection.execute("VACUUM ANALYZE")


def giant(url: str) -> float:
    """The limit: rows a second of one UPDATE with values computed beforehand."""
    old, new = LocalEncrypted(OLD.raw), LocalEncrypted(NEW.raw)
    with psycopg.connect(url) as connection:
        connection.execute("CREATE UNLOGGED TABLE ready (id uuid, material jsonb)")
        rows = connection.execute("SELECT id, material FROM company_secret_versions").fetchall()
        with connection.cursor().copy("COPY ready FROM STDIN") as copy:
            for key, material in rows:
                copy.write_row((key, json.dumps(new.seal(old.open(material)))))
        connection.execute("ANALYZE ready")
        connection.commit()
        began = time.perf_counter()
        cursor = connection.execute(
            "UPDATE company_secret_versions v SET material = r.material FROM ready r WHERE r.id = v.id"
        )
        assert cursor.rowcount == VERSIONS
        seconds = time.perf_counter() - began
    return VERSIONS / seconds


class _Base(orm.DeclarativeBase):
    pass


class Version(_Base):
    """A secret version as an ORM has it."""

    __tablename__ = "company_secret_versions"
    id: orm.Mapped[Any] = orm.mapped_column(sa.Uuid, primary_key=True)
    material: orm.Mapped[Any] = orm.mapped_column(JSONB)


def loop(url: str, *, each: bool) -> float:
    """Rows a second of an ORM loop; `each`: with a commit a row, on FEW rows, else one flush of all."""
    engine = sa.create_engine(url.replace("postgres://", "postgresql+psycopg://", 1))
    old, new = LocalEncrypted(OLD.raw), LocalEncrypted(NEW.raw)
    number = FEW if each else VERSIONS
    began = time.perf_counter()
    with orm.Session(engine) as session:
        query = sa.select(Version).limit(number)
        if each:
            for key in session.scalars(sa.select(Version.id).limit(number)).all():
                row = session.get_one(Version, key)
                row.material = new.seal(old.open(row.material))
                session.commit()
        else:
            for row in session.scalars(query.execution_options(yield_per=2_000)):
                row.material = new.seal(old.open(row.material))
            session.commit()
    engine.dispose()
    return number / (time.perf_counter() - began)


def steps(url: str, run: str) -> dict[str, float]:
    """Seconds of the bites of each step of a run."""
    query = """
        SELECT split_part(s.key, ':', 1), sum(b.microseconds) / 1e6
        FROM paperclip_worker.bites b JOIN paperclip_worker.shards s
          ON (s.run_id, s.sweep, s.number) = (b.run_id, b.sweep, b.shard)
        WHERE b.run_id = %s GROUP BY 1
    """
    with psycopg.connect(url) as connection:
        return {name: float(seconds) for name, seconds in connection.execute(query, (run,))}


def aside(url: str, run: str) -> float:
    """Seconds in which ciphertext was made ready, by however many processes."""
    query = """
        SELECT extract(epoch FROM max(touched_at) - min(touched_at - microseconds * interval '1 microsecond'))
        FROM paperclip_worker.shards WHERE run_id = %s AND key LIKE 'make-ready:company_secret_versions%%'
    """
    with psycopg.connect(url) as connection:
        row = connection.execute(query, (run,)).fetchone()
        assert row is not None
        return float(row[0])


def test_rotation(large: bench.Bench, tmp_path: Path, capsys: Any) -> None:
    """Aside >= 2 x the giant, whole >= 0.5 x, 20 x a commit a row, 2 x a flush; lock <= 1.3 x; RSS < 250 MB."""
    environment = large.copy(f"vault{VERSIONS}", "paperclip", fill)
    url, file = environment["DATABASE_URL"], tmp_path / "secrets" / "master.key"
    file.parent.mkdir(mode=0o700)
    environment["PAPERCLIP_SECRETS_MASTER_KEY_FILE"] = str(file)
    new = tmp_path / "new.key"
    new.write_text(NEW.text)
    words = ("--new-key-file", str(new))
    found: dict[str, list[float]] = {name: [] for name in ("giant", "aside", "whole", "lock", "peak", "plan")}
    for _ in range(bench.REPEATS):
        bench.copy_of(large.admin, f"vault{VERSIONS}", "bench")
        found["giant"].append(giant(url))
        bench.copy_of(large.admin, f"vault{VERSIONS}", "bench")
        bench.forget(environment)
        file.write_text(OLD.text)
        notes = bench.cli(environment, "plan", "rotate-master-key", *words, "--json")["notes"]
        found["plan"].append(next(float(note.split()[4]) for note in notes if note.startswith("lock:")))
        with bench.Worker(environment) as worker:
            result = bench.cli(environment, "run", "rotate-master-key", "--yes", "--json", *words)
            found["peak"].append(worker.peak())
        assert result["kept"]
        assert result["rows"] == VERSIONS
        began, ended = (datetime.fromisoformat(result[name]) for name in ("created_at", "settled_at"))
        seconds = steps(url, result["run"])
        evidence = result["receipt"]["evidence"]
        found["lock"].append(evidence["lock_microseconds"] / 1e6)
        found["whole"].append(VERSIONS / (ended - began).total_seconds())
        found["aside"].append(VERSIONS / aside(url, result["run"]))
        bench.say(capsys, f"steps: {seconds}, whole {(ended - began).total_seconds():.1f} s")
    middle = {name: bench.median(values) for name, values in found.items()}
    limit = middle["giant"]
    bench.copy_of(large.admin, f"vault{VERSIONS}", "bench")
    flush = loop(url, each=False)
    bench.copy_of(large.admin, f"vault{VERSIONS}", "bench")
    each = loop(url, each=True)
    bench.say(
        capsys,
        f"{VERSIONS:,} versions: giant {limit:,.0f} rows/s; made ready aside {middle['aside'] / limit:.2f} x, "
        f"whole {middle['whole'] / limit:.2f} x the giant, {middle['whole'] / flush:.1f} x a bulk flush, "
        f"{middle['whole'] / each:.0f} x a commit a row; lock {middle['lock'] * limit / VERSIONS:.2f} x the giant's "
        f"time, planned {middle['plan']:.1f} s, was {middle['lock']:.1f} s; RSS {middle['peak']:.0f} MB",
    )


_NODE = """
import postgres from "postgres"; import crypto from "node:crypto";
const [url, ...rest] = process.argv.slice(2), limit = +rest[2], how = rest[3];
const [oldKey, newKey] = rest.slice(0, 2).map(k => Buffer.from(k, "base64"));
const sql = postgres(url, {max: 1, onnotice: () => {}});
const reseal = m => {
  const d = crypto.createDecipheriv("aes-256-gcm", oldKey, Buffer.from(m.iv, "base64"));
  d.setAuthTag(Buffer.from(m.tag, "base64"));
  const text = Buffer.concat([d.update(Buffer.from(m.ciphertext, "base64")), d.final()]);
  const iv = crypto.randomBytes(12), c = crypto.createCipheriv("aes-256-gcm", newKey, iv);
  const ciphertext = Buffer.concat([c.update(text), c.final()]).toString("base64");
  return {scheme: m.scheme, iv: iv.toString("base64"), tag: c.getAuthTag().toString("base64"), ciphertext};
};
const one = (tx, row) =>
  tx`UPDATE company_secret_versions SET material = ${tx.json(reseal(row.material))} WHERE id = ${row.id}`;
if (how !== "set-based") {
  const began = Date.now(), rows = await sql`SELECT id, material FROM company_secret_versions LIMIT ${limit}`;
  if (how === "commit a row") for (const row of rows) await sql.begin(tx => one(tx, row));
  else await sql.begin(async tx => {
    for (let at = 0; at < rows.length; at += 1000)
      await Promise.all(rows.slice(at, at + 1000).map(row => one(tx, row)));
  });
  console.log(rows.length / (Date.now() - began) * 1000); await sql.end(); process.exit();
}
let last = "00000000-0000-0000-0000-000000000000", done = 0; const began = Date.now();
for (;;) {
  const rows = await sql`SELECT id, material FROM company_secret_versions WHERE id > ${last} ORDER BY id LIMIT 1000`;
  if (!rows.length || done >= limit) break;
  await sql.begin(async tx => {
    const ids = rows.map(r => r.id), values = rows.map(r => JSON.stringify(reseal(r.material)));
    await tx`UPDATE company_secret_versions v SET material = n.material::jsonb
      FROM unnest(${ids}::uuid[], ${values}::text[]) AS n(id, material) WHERE v.id = n.id`;
  });
  done += rows.length; last = rows[rows.length - 1].id;
}
console.log(done / (Date.now() - began) * 1000); await sql.end();
"""


def test_node(large: bench.Bench, tmp_path: Path, capsys: Any) -> None:
    """The ORM's two loops in the app's own language, and its best; skipped where there is no Node or no package."""
    folder = os.environ.get("BENCH_NODE_MODULES")
    if shutil.which("node") is None or folder is None:
        pytest.skip("needs node, and BENCH_NODE_MODULES with the postgres package in it")
    (tmp_path / "node_modules").symlink_to(folder)
    script = tmp_path / "loop.mjs"
    script.write_text(_NODE)
    for how, number in (("commit a row", FEW), ("one transaction, pipelined", VERSIONS), ("set-based", VERSIONS)):
        environment = large.copy(f"vault{VERSIONS}", "paperclip", fill)
        words = ["node", str(script), environment["DATABASE_URL"], OLD.text, NEW.text, str(number), how]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        bench.say(capsys, f"Node, {how}: {float(done.stdout):,.0f} rows/s")
