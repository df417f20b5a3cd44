"""paperclip-worker: the operator's command line. Commands live in `worker/commands`, one noun a module."""

from __future__ import annotations

import os
import select
import signal
import sys

import click

from worker import commands
from worker.errors import Exit, WorkerError
from worker.params import is_text


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="paperclip-worker")
@click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
def cli(debug: bool) -> None:
    """Compliance and maintenance jobs for a Paperclip deployment.

    Jobs run against the deployment's own database and bucket, by Celery workers. A job is planned, rehearsed and
    run; each run leaves a signed receipt.

    \b
    First time:   paperclip-worker keygen signing.pem     make the key that signs receipts
                  paperclip-worker db init                create the ledger in the database
                  paperclip-worker worker                 start a worker
    Then:         paperclip-worker plan prune-logs        what would go, what would stay
                  paperclip-worker run prune-logs         show the plan, ask, run, follow

    Settings come from the environment: DATABASE_URL and PAPERCLIP_STORAGE_S3_* as the app has them, the rest as
    PAPERCLIP_WORKER_* (docs/configuration.md).

    Exit status: 0 done and kept, 1 a promise is unkept, 2 misuse or refused, 3 already under way.
    """
    del debug  # read by main()


for _command in commands.all_commands():
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every refusal and failure is one sentence on stderr and an exit status."""
    if not all(map(is_text, sys.argv[1:])):
        _complain("an argument is not UTF-8")
        sys.exit(Exit.REFUSED)
    try:
        status = cli.main(prog_name="paperclip-worker", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(Exit.REFUSED)
    except click.ClickException as error:
        _complain(error.format_message())
        sys.exit(Exit.REFUSED)
    except click.Abort:
        _complain("cancelled; nothing was started")
        sys.exit(Exit.REFUSED)
    except SystemExit as end:
        # So click ends where what was written has no reader.
        if end.code == 1 and any(map(_unread, (1, 2))):
            _end_unread()
        raise
    except WorkerError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        _complain(
            f"internal error ({type(error).__name__}); run it again with --debug before the command to see where"
        )
        sys.exit(Exit.UNKEPT)
    sys.exit(status if isinstance(status, int) else Exit.KEPT)


def _unread(stream: int) -> bool:
    """Whether nobody is left to read what is written there."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_unread() -> None:
    """End as other tools do whose reader has gone: by the signal. A status of ours would be about a promise."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)


def _complain(message: str) -> None:
    try:
        click.echo("paperclip-worker: " + " ".join(message.split()), err=True)
    except BrokenPipeError:
        _end_unread()


if __name__ == "__main__":
    main()
