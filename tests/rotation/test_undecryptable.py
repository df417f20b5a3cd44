"""Ciphertext that no key opens is named, allowed by number, and left byte for byte as it is."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import keyring
from worker.errors import Refused

RUN = ("run", "rotate-master-key", "--inline", "--yes", "--generate")


def _lose(vault: Vault) -> dict[str, str]:
    """Three rows that open with no key: another's, one without a tag, one with a number for an IV."""
    lost = {}
    with vault.connect() as connection:
        for damage in ({}, {"tag": None}, {"iv": 7}):
            key = None if damage else keyring.generate()
            row = vault.add_version(connection, "lost", key=key)
            del vault.held["company_secret_versions", str(row)]
            connection.execute(
                "UPDATE company_secret_versions SET material = material || %s::jsonb WHERE id = %s",
                (json.dumps(damage), row),
            )
            lost[str(row)] = ""
    return _rows(vault, lost)


def _rows(vault: Vault, ids: Any) -> dict[str, str]:
    query = "SELECT id::text, xmin::text || t::text FROM company_secret_versions t WHERE id = ANY(%s)"
    return dict(vault.deployment.query(query, [UUID(one) for one in ids]))


def _opened(vault: Vault, lost: dict[str, str]) -> None:
    """All but the lost rows open with the key in the file, and no other."""
    vault.deployment.query("DELETE FROM company_secret_versions WHERE id = ANY(%s)", [UUID(one) for one in lost])
    assert vault.opened(vault.now) == vault.held


def test_they_are_listed_in_the_plan(vault: Vault) -> None:
    lost = _lose(vault)
    plan = vault.deployment.json("plan", "rotate-master-key", "--generate")
    noted = {one for one in plan["notes"] if one.startswith("undecryptable: ")}
    assert noted == {f"undecryptable: company_secret_versions {one}" for one in lost}
    assert {one["reason"] for one in plan["left"]} == {"undecryptable"}
    assert sum(one["rows"] for one in plan["left"]) == 3
    assert plan["rows"] == len(vault.held)


@pytest.mark.parametrize("words", [(), ("--allow-undecryptable", "2")])
def test_more_than_were_allowed_are_refused(vault: Vault, words: tuple[str, ...]) -> None:
    lost = _lose(vault)
    before, files = vault.deployment.digest(), sorted(vault.file.parent.iterdir())
    refused(vault.deployment, *RUN, *words, says="3 ciphertexts open with no key")
    refused(vault.deployment, *RUN, *words, says="--allow-undecryptable 3")
    assert vault.deployment.digest() == before
    assert sorted(vault.file.parent.iterdir()) == files
    assert vault.now == vault.key
    assert _rows(vault, lost) == lost


def test_as_many_as_were_allowed_stay_as_they_are(vault: Vault) -> None:
    lost = _lose(vault)
    result = vault.run("--generate", "--allow-undecryptable", "3")
    assert result["kept"] is True
    assert result["left"]
    assert sum(one["rows"] for one in result["left"]) == 3
    assert result["receipt"]["left"] == result["left"]
    assert _rows(vault, lost) == lost
    _opened(vault, lost)


def test_one_more_that_comes_meanwhile_breaks_the_promise(vault: Vault) -> None:
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.SWEEP)
    with vault.connect() as connection:
        row = vault.add_version(connection, "x", key=keyring.generate())
    result = steps.work(vault, run)
    assert result["state"] == "unkept"
    assert [one["what"] for one in result["findings"]] == ["sealed with neither key, and was not when the run began"]
    del vault.held["company_secret_versions", str(row)]
    _opened(vault, {str(row): ""})


def _exchange(vault: Vault, lost: dict[str, str]) -> str:
    """One that was lost goes, and another comes."""
    gone, *_ = lost
    vault.deployment.query("DELETE FROM company_secret_versions WHERE id = %s", UUID(gone))
    with vault.connect() as connection:
        row = vault.add_version(connection, "lost", key=keyring.generate())
    del vault.held["company_secret_versions", str(row)]
    return str(row)


@pytest.mark.parametrize("moved", [False, True], ids=["", "and the tables are rewritten"])
def test_one_that_comes_for_one_that_goes_breaks_the_promise(vault: Vault, moved: bool) -> None:
    lost = _lose(vault)
    run = steps.start(vault, generate=True, allow_undecryptable=3)
    steps.work_until(vault, run, steps.SWEEP)
    row = _exchange(vault, lost)
    if moved:
        with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as admin:
            admin.execute("VACUUM FULL company_secret_versions")
    result = steps.work(vault, run)
    assert result["state"] == "unkept"
    assert [(one["rows"], one["what"]) for one in result["findings"]] == [
        (1, "sealed with neither key, and was not when the run began")
    ]
    _opened(vault, lost | {row: ""})


def test_what_a_crash_made_us_forget_is_told_by_its_number(vault: Vault) -> None:
    lost = _lose(vault)
    run = steps.start(vault, generate=True, allow_undecryptable=3)
    steps.work_until(vault, run, steps.SWEEP)
    vault.deployment.query("TRUNCATE paperclip_worker.resealed")
    assert steps.work(vault, run)["kept"] is True
    _opened(vault, lost)


def test_what_an_earlier_release_did_not_note_is_told_by_its_number(vault: Vault) -> None:
    """The run cut over, and then its workers were exchanged: nothing is new to them that was there before."""
    lost = _lose(vault)
    run = steps.start(vault, generate=True, allow_undecryptable=3)
    steps.work_until(vault, run, steps.SWEEP)
    for query in (
        "UPDATE paperclip_worker.resealed SET value = value->'files' WHERE carrier = 'marked'",
        "DELETE FROM paperclip_worker.resealed WHERE carrier ~ '^(seen|lost|odd):'",
    ):
        vault.deployment.query(query)
    result = steps.work(vault, run)
    assert result["kept"] is True, result["findings"]
    _opened(vault, lost)


@pytest.mark.parametrize("allowed", [3, 4])
def test_more_that_come_before_the_cut_over_are_refused_as_well(vault: Vault, allowed: int) -> None:
    """Also where one went: who allowed it allowed just that one. What is allowed does not break the promise."""
    lost = _lose(vault)
    run = steps.start(vault, generate=True, allow_undecryptable=allowed)
    steps.work_until(vault, run, steps.CUT_OVER)
    row = _exchange(vault, lost)
    if allowed == 4:
        result = steps.work(vault, run)
        assert result["kept"] is True
        assert sum(one["lost"] for one in result["receipt"]["evidence"]["envelopes"]["before"].values()) == 4
        _opened(vault, lost | {row: ""})
        return
    with pytest.raises(Refused, match=r"4 ciphertexts open with no key .*--allow-undecryptable 4"):
        steps.work(vault, run)
    assert vault.now == vault.key
    _opened(vault, lost | {row: ""})


@pytest.mark.parametrize("digest", ["ab\ncd", "ab\x02cd", 'ab"\x01', "0" * 63])
def test_a_digest_that_is_none_is_one_that_does_not_fit(released_vault: Vault, digest: str) -> None:
    vault = released_vault
    with vault.connect() as connection:
        vault.add_version(connection, "odd", value_sha256=digest)
    plan = vault.deployment.json("plan", "rotate-master-key", "--generate")
    assert [one for one in plan["notes"] if one.startswith("odd: 1 ")]
    assert vault.run("--generate")["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_one_that_was_odd_before_does_not_break_the_promise(released_vault: Vault) -> None:
    vault = released_vault
    with vault.connect() as connection:
        vault.add_version(connection, "odd", value_sha256="0" * 64)
    plan = vault.deployment.json("plan", "rotate-master-key", "--generate")
    assert [one for one in plan["notes"] if one.startswith("odd: 1 ")]
    assert vault.run("--generate")["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_one_that_is_odd_only_afterwards_does(released_vault: Vault) -> None:
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.SWEEP)
    (row, *_) = (one for table, one in vault.held if table == "company_secret_versions")
    vault.deployment.query("UPDATE company_secret_versions SET value_sha256 = '0' WHERE id = %s", UUID(row))
    result = steps.work(vault, run)
    assert result["state"] == "unkept"
    (finding,) = result["findings"]
    assert finding["what"] == "opens to other bytes than its digest says, and was not when the run began"


def test_a_negative_number_is_refused(vault: Vault) -> None:
    refused(vault.deployment, *RUN, "--allow-undecryptable", "-1", says="--allow-undecryptable")
    vault.deployment.query("SELECT 1")
    assert vault.now == vault.key
