"""plan and rehearse of a rotation: what they say, and that they leave the world as it was."""

from __future__ import annotations

import re
from collections import Counter

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import keyring, layouts

RUN = ("run", "rotate-master-key", "--inline")


def test_plan_and_rehearse_change_nothing_anywhere(vault: Vault) -> None:
    path, _ = steps.key_file(vault)
    before = steps.everything(vault)
    for words in (
        ("--generate",),
        ("--new-key-file", str(path)),
        ("--new-key-file", str(path), "--cutover", "manual"),
    ):
        plan = vault.deployment.json("plan", "rotate-master-key", *words)
        rehearsed = vault.deployment.json("rehearse", "rotate-master-key", *words)
        assert plan["rows"] == rehearsed["rows"] == len(vault.held)
        counted = Counter({(one["table"], one["company"]): one["rows"] for one in plan["tally"]})
        assert counted == Counter({(one["table"], one["company"]): one["rows"] for one in rehearsed["tally"]})
        assert steps.everything(vault) == before
    assert vault.deployment.cli("plan", "rotate-master-key", "--generate").stdout.count("note: ") > 2
    assert steps.everything(vault) == before


def test_the_notes_say_keys_and_counts_of_each_carrier(vault: Vault) -> None:
    path, new = steps.key_file(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "done", key=new)
        vault.add_version(connection, "lost", key=keyring.generate())
    notes = vault.deployment.json("plan", "rotate-master-key", "--new-key-file", str(path))["notes"]
    assert notes[0].startswith(f"keys: from {vault.key.fingerprint} to {new.fingerprint};")
    counts: Counter[str] = Counter()
    for (table, _), values in vault.held.items():
        counts[table] += values.total()
    for carrier in layouts.LAYOUTS[vault.layout].carriers:
        more = carrier.column.name == "material"
        old = counts[carrier.table.name] - 2 * more
        foreign = 2 * (carrier.name == "company_secret_versions.material" and vault.layout == "paperclip")
        said = (
            f"{carrier.name}: {old} under the old key, {int(more)} under the new, {int(more)} under neither, "
            f"{foreign} of another scheme"
        )
        assert said in notes
    assert [one for one in notes if one.startswith("lock: writers wait about 0.1 s")]
    assert [one for one in notes if re.fullmatch(r"disk: the database grows by about \d+ MiB, WAL included", one)]
    assert vault.deployment.json("plan", "rotate-master-key", "--generate")["notes"][0].startswith(
        f"keys: from {vault.key.fingerprint} to a key still to be made;"
    )


def test_a_key_file_that_others_may_read_is_noted(released_vault: Vault) -> None:
    released_vault.file.chmod(0o644)
    notes = released_vault.deployment.json("plan", "rotate-master-key", "--generate")["notes"]
    assert [one for one in notes if one.startswith("warning: ") and "mode 0644" in one]


def test_an_approved_plan_runs_until_the_secrets_have_changed(vault: Vault) -> None:
    path, _ = steps.key_file(vault)
    words = ("rotate-master-key", "--new-key-file", str(path))
    stale = vault.deployment.json("plan", *words)["hash"]
    with vault.connect() as connection:
        row = vault.add_version(connection, "another")
    before = steps.everything(vault)
    refused(vault.deployment, *RUN, *words[1:], "--plan", stale, says="--plan: the world has drifted")
    assert steps.everything(vault) == before
    approved = vault.deployment.json("plan", *words)["hash"]
    # The same number of rows and bytes, and another row state.
    vault.deployment.query("UPDATE company_secret_versions SET version = version + 1 WHERE id = %s", row)
    refused(vault.deployment, *RUN, *words[1:], "--plan", approved, says="--plan: the world has drifted")
    approved = vault.deployment.json("plan", *words)["hash"]
    vault.deployment.cli(*RUN, *words[1:], "--plan", approved)
    assert vault.opened(vault.now) == vault.held
    ((said,),) = vault.deployment.query("SELECT plan_hash FROM paperclip_worker.runs")
    assert said == approved
