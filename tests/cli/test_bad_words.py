"""Words that make no sense are refused in one line that says which and why, and change nothing."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Watch
from tests.cli.helpers import INLINE, PRUNE, refused
from tests.conftest import Deployment

UNKNOWN = "00000000-0000-4000-8000-000000000000"
PLAN = ("plan", "prune-logs")
HOLD = ("holds", "add", "--reason", "case 7")
POLICY = ("policy", "set", "--table", "activity_log", "--reason", "law 12")

# What follows the command, and what the one line must say.
_WORDS: list[tuple[tuple[str, ...], str]] = [
    (("run", "nosuch"), "no job 'nosuch'.*prune-logs"),
    (("plan", "nosuch"), "no job 'nosuch'.*prune-logs"),
    (("nosuch",), "nosuch"),
    (("runs", "nosuch"), "nosuch"),
    ((*PLAN, "--nosuch"), "--nosuch"),
    ((*INLINE, "--older-than", "90"), "90.*is not a duration.*90d"),
    ((*INLINE, "--older-than", "abc"), "abc.*is not a duration"),
    ((*INLINE, "--older-than", "-5d"), "-5d.*is not a duration"),
    ((*INLINE, "--older-than", "0d"), "0d.*above zero"),
    ((*INLINE, "--older-than", ""), "is not a duration"),
    ((*INLINE, "--older-than", "9\uff10d"), "is not a duration"),
    ((*INLINE, "--company", UNKNOWN), f"{UNKNOWN} is not a company"),
    ((*PLAN, "--company", UNKNOWN), f"{UNKNOWN} is not a company"),
    ((*INLINE, "--company", "acme"), "acme.*is not an id"),
    ((*INLINE, "--table", "nosuch"), "nosuch is not a log.*activity_log"),
    ((*INLINE, "--table", ""), "is not a log"),
    ((*INLINE, "--table", "activity_log; DROP TABLE companies"), "is not a log"),
    ((*PLAN, "--table", "cost_events"), "cost_events is never pruned.*budgets"),
    ((*INLINE, "--table", "cost_events"), "cost_events is never pruned.*budgets"),
    ((*INLINE, "--table", "session", "--company", UNKNOWN), "session belong to no company"),
    ((*INLINE, "--table", "plugin_logs", "--keep-security"), "plugin_logs does not say"),
    ((*INLINE, "--detach"), "exclude each other"),
    ((*PRUNE, "--inline"), "destructive.*--yes"),
    ((*PRUNE, "--inline", "--json"), "destructive.*--yes"),
    ((*PRUNE, "--inline", "--plan", "nosuch"), "--plan is not the hash of a plan"),
    ((*PRUNE, "--inline", "--plan", ""), "--plan is not the hash of a plan"),
    ((*PRUNE, "--inline", "--plan", "20260101T000000.000000Z-" + "0" * 23), "--plan is not the hash of a plan"),
    ((*PRUNE, "--inline", "--plan", "20260101T000000.000000Z-" + "0" * 24), "--plan.*drifted"),
    ((*PRUNE, "--inline", "--plan", "29990101T000000.000000Z-" + "0" * 24), "--plan"),
    ((*PRUNE, "--inline", "--plan", "00010101T000000.000000Z-" + "0" * 24), "--plan is not the hash of a plan"),
    (("runs", "resume", "last", "--inline", "--detach"), "exclude each other"),
    (("ping", "--timeout", "nan"), "--timeout"),
    ((*HOLD, "--table", "activity_log", "--until", "9999-12-31T23:59:59-12:00"), "--until.*too far away"),
    (("policy", "set", "--table", "activity_log", "--keep", "5d", "--reason", " ", "--yes"), "--reason is empty"),
    (("runs", "show", "nosuch"), "no run has an id that starts with 'nosuch'"),
    (("runs", "show", "last"), "no run"),
    (("runs", "show", "%"), "no run"),
    (("runs", "watch", "nosuch"), "no run"),
    (("runs", "stop", "nosuch"), "no run"),
    (("runs", "resume", "nosuch", "--inline"), "no run"),
    (("runs", "list", "--state", "nosuch"), "nosuch"),
    (("runs", "list", "--limit", "0"), "limit"),
    (("receipts", "show", "999"), "no receipt 999"),
    (("receipts", "verify", "--from-s3", "--anchors"), "--from-s3 and --anchors cannot be combined"),
    (("receipts", "show", "0"), "0"),
    (("receipts", "show", "99999999999999999999"), "99999999999999999999"),
    (("receipts", "verify", "--public-key", "/nosuch"), "nosuch"),
    (("receipts", "verify", "--public-key", __file__), "not a public key"),
    (("keygen", "/nosuch/signing.pem"), "cannot be written"),
    (("db", "grants", "--role", ""), "--role is not a name"),
    (("db", "grants", "--role", "x" * 64), "--role is not a name"),
    *((("db", "grants", "--role", name), "--role is not a name") for name in ("public", "none", "pg_monitor")),
    (HOLD, "exactly one of --company, --user, --task and --table"),
    ((*HOLD, "--table", "activity_log", "--user", "x"), "exactly one of"),
    ((*HOLD, "--user", "nobody@nowhere.example"), "--user: there is no user with the id or email"),
    ((*HOLD, "--company", "acme"), "--company: there is no company with the id or name"),
    ((*HOLD, "--task", "ZZZ-1"), "--task: there is no task with the id or identifier"),
    ((*HOLD, "--table", "nosuch"), "nosuch is not a log"),
    ((*HOLD, "--table", "cost_events"), "cost_events is never pruned"),
    ((*HOLD, "--table", "activity_log", "--until", "2020-01-31"), "--until: .* is past"),
    ((*HOLD, "--table", "activity_log", "--until", "soon"), "'soon' is not a date"),
    (("holds", "add", "--table", "activity_log"), "--reason"),
    (("holds", "add", "--table", "activity_log", "--reason", " "), "--reason is empty"),
    (("holds", "release", "nosuch", "--reason", "x", "--yes"), "no hold has an id"),
    (("holds", "release", "", "--reason", "x", "--yes"), "no hold has an id"),
    ((*POLICY, "--keep", "0d"), "above zero"),
    ((*POLICY, "--keep", "many"), "not a duration"),
    (POLICY, "--keep"),
    ((*POLICY[:4], "--keep", "365d"), "--reason"),
    ((*POLICY[:4], "--keep", "365d", "--reason", ""), "--reason is empty"),
    ((*POLICY, "--keep", "365d", "--company", "nobody"), "--company: there is no company"),
    (("policy", "set", "--table", "nosuch", "--keep", "365d", "--reason", "x"), "nosuch is not a log"),
    (("policy", "set", "--table", "cost_events", "--keep", "365d", "--reason", "x"), "cost_events is never pruned"),
    (
        ("policy", "set", "--table", "session", "--keep", "9d", "--reason", "x", "--company", "Northwind Robotics 1"),
        "--company: the rows of session belong to no company",
    ),
    (("policy", "preview", "--table", "nosuch", "--keep", "9d"), "nosuch is not a log"),
    (("policy", "remove", "--table", "activity_log", "--reason", "x"), "no such policy"),
]


@pytest.mark.parametrize(("words", "says"), _WORDS, ids=[" ".join(words) for words, _ in _WORDS])
def test_bad_words(standing: Deployment, watch: Watch, words: tuple[str, ...], says: str) -> None:
    refused(standing, *words, says=says)
    watch.check_unchanged()
