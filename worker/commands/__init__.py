"""The commands, one noun a module. Modules here import at the top only what `--help` needs."""

from __future__ import annotations

import click


def all_commands() -> list[click.Command]:
    """Every top-level command, in the order `--help` teaches them."""
    from worker.commands import database, demo, holds, jobs, keys, liveness, policy, receipts, runs, services

    return [
        demo.demo,
        jobs.plan,
        jobs.rehearse,
        jobs.run,
        runs.runs,
        receipts.receipts,
        policy.policy,
        holds.holds,
        keys.keys,
        services.schedule,
        services.metrics,
        database.db,
        receipts.keygen,
        services.worker,
        services.beat,
        liveness.ping,
    ]
