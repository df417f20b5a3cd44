"""What commands share: settings, `--json`, tables, confirmation, following a run."""

from __future__ import annotations

import getpass
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from worker.errors import Exit, Interrupted, Refused, WorkerError
from worker.params import is_text
from worker.states import ACTIVE, SETTLED

if TYPE_CHECKING:
    from worker.config import Need, Settings
    from worker.operations import Operations
    from worker.rules import Look

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """`--json`: one JSON object on stdout instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def settings(*needs: Need) -> Settings:
    """The settings, with everything the command needs."""
    from worker import config

    return config.load(needs=needs)


def operations(*needs: Need) -> Operations:
    """The deployment; every command that touches it needs at least the database."""
    from worker import logs
    from worker.config import Need
    from worker.operations import Operations

    # An operator's command speaks through its result; the services log.
    logs.silence()
    found = Operations(settings(Need.DATABASE, *needs))
    click.get_current_context().call_on_close(found.close)
    return found


def broker(deployment: Operations) -> Callable[[UUID], None]:
    """How a run reaches the workers. Refused, before any run exists, when the broker cannot be used.

    The function returned raises WorkerError, which says what becomes of the run, when the broker takes no message.
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from worker import app, brokers

    celery = app.make(deployment.settings)
    click.get_current_context().call_on_close(celery.close)
    brokers.require_own(celery, deployment.require_ledger())

    def send(run: UUID) -> None:
        try:
            app.send_work(celery, run)
        except (OSError, OperationalError, RedisError) as error:
            raise WorkerError(
                f"run {run} is entered, but the broker took no message of it (is it full?); rescue sends one when "
                f"the broker takes it, `runs stop {run}` ends the run"
            ) from error

    return send


def print_json(value: Any) -> None:
    """One object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def actor_option(command: F) -> F:
    """`--actor`: who does it, for the evidence."""
    return click.option("--actor", help="Who; kept as evidence.  [default: the login name]")(command)


def login() -> str:
    """The login name, where there is one. Refused when it is not text."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user id without an account, as in a container; KeyError before Python 3.13
        return "unknown"
    if not is_text(name):
        raise Refused("the login name is not UTF-8; say who it is with --actor")
    return name


def require_answer(*, yes: bool, as_json: bool, what: str, other: str = "") -> None:
    """Refused, before anything is shown, where nobody could answer and no option has answered already."""
    if not yes and (as_json or not terminal(sys.stdin)):
        raise Refused(f"{what}: look at it first, then confirm with --yes{other}")


def confirm(subject: str, *, yes: bool) -> None:
    """Have the subject's name typed, unless `--yes` was given. Refused on another answer."""
    if not yes and click.prompt(f"type {subject} to go on", default="", show_default=False) != subject:
        raise Refused("not confirmed; nothing was started or changed")


def print_rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Tab-separated lines with a header, for eyes and for cut(1)."""
    click.echo("\t".join(header))
    for row in rows:
        click.echo("\t".join("-" if cell is None else on_one_line(str(cell)) for cell in row))


def on_one_line(text: str) -> str:
    """What somebody entered, with its tabs, line breaks and other controls written out: they would fake a cell."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def talk(text: str) -> None:
    """Say something to a person at a terminal; scripts see nothing of it."""
    if terminal(sys.stderr):
        click.echo(text, err=True)


def terminal(stream: IO[str] | None) -> bool:
    """Whether a person is at the other end; a stream that was closed before the start is None."""
    return stream is not None and stream.isatty()


def number(value: int) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes for eyes."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def exit_status(state: str) -> Exit:
    """The exit status of a run that has settled in this state."""
    return Exit.KEPT if state == "kept" else Exit.UNKEPT


@contextmanager
def entered(run: UUID) -> Iterator[None]:
    """From here on there is a run, which may go on: whatever cuts the command off now is no refusal."""
    with _done(
        f"run {run} is entered, and workers take it up; `runs watch {run}` follows it, `runs stop {run}` ends it",
        f"run {run} is entered, and `runs show {run}` says how it stands",
    ):
        yield


def told_to_stop(run: UUID) -> AbstractContextManager[None]:
    """From here on a run was told to stop, and workers end it: whatever cuts the command off now is no refusal."""
    onward = f"run {run} is told to stop; `runs stop {run}` again sees to its end, as workers do"
    return _done(onward, onward)


@contextmanager
def _done(left: str, failed: str) -> Iterator[None]:
    """Something was changed: Ctrl-C says that with `left`, and a fault that would be a refusal with `failed`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(left) from None
    except WorkerError as error:
        if error.exit_code is Exit.UNKEPT:
            raise
        raise WorkerError(f"{failed}: {error}") from error


@contextmanager
def _ctrl_c(said: str = "") -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, in place of an exception wherever the process may be; a second one raises it."""
    asked = threading.Event()

    def hear(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.set()
        if said:
            talk(said)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def follow(deployment: Operations, run: UUID, *, leave: Callable[[], bool] = lambda: False) -> bool:
    """Wait until a run has settled, with a progress bar on a terminal; False when `leave` says so, or Ctrl-C."""
    from worker.progress import follow as wait

    with _ctrl_c() as asked:
        try:
            return wait(
                deployment,
                run,
                show=terminal(sys.stderr),
                leave=lambda: asked() or leave(),
                tell=lambda what: click.echo(f"paperclip-worker: {what}", err=True),
            )
        except KeyboardInterrupt:
            return False


def left(deployment: Operations, run: UUID, *, as_json: bool) -> Exit:
    """Print the run that its operator leaves to the workers."""
    if as_json:
        print_json(deployment.result(run))
    else:
        click.echo(str(run))
    return Exit.KEPT


def detached(deployment: Operations, run: UUID, *, as_json: bool) -> Exit:
    """Print where a run stands that its operator follows no more."""
    if as_json:
        print_json(deployment.result(run))
    click.echo(f"detached; the run goes on: paperclip-worker runs watch {run}", err=True)
    return Exit.KEPT


def work_inline(deployment: Operations, run: UUID) -> bool:
    """Work on a run in this process. A fault that ended the run is for `report` to tell; any other is raised.

    False when Ctrl-C made it leave the run, after the batch in hand. A second one cuts that off: Interrupted.
    """
    with _ctrl_c("the batch in hand is finished; Ctrl-C again cuts it off") as asked:
        try:
            deployment.runner().work(run, seconds=math.inf, leave=asked)
        except KeyboardInterrupt:
            raise Interrupted(
                f"run {run} was cut off within a batch, which is rolled back; {_onward(deployment, run)}"
            ) from None
        except WorkerError:
            if deployment.find(str(run)).state not in SETTLED:
                raise
        return not asked()


def _onward(deployment: Operations, run: UUID) -> str:
    rescue = f"{deployment.settings.rescue_after:g} s"
    return f"`runs resume {run} --inline` goes on, as workers do after {rescue}; `runs stop {run}` ends it"


def report(deployment: Operations, run: UUID, *, as_json: bool) -> Exit:
    """Print what a settled run did; its exit status. An unkept or failed one also says so on stderr."""
    result = deployment.result(run)
    if as_json:
        print_json(result)
    else:
        print_result(result)
    if not result["kept"]:
        under_way = _onward(deployment, run) if result["state"] in ACTIVE else None
        why = (
            under_way or result["error"] or "; ".join(one["what"] for one in result["findings"]) or "see `runs show`"
        )
        click.echo(f"paperclip-worker: run {run} is {result['state']}: {why}", err=True)
    return exit_status(result["state"])


def print_result(result: dict[str, Any]) -> None:
    """A run for eyes: its state, tally, what stayed, findings, receipt."""
    click.echo(f"run {result['run']}  {result['job']}  {result['state']}")
    if result["stage"]:
        click.echo(f"stage {result['stage']}")
    if result["error"]:
        click.echo(f"error: {on_one_line(result['error'])}")
    click.echo(f"rows {number(result['rows'])} of {number(result['planned'] or 0)} planned, {size(result['bytes'])}")
    print_rows(
        ("table", "company", "rows", "bytes"),
        [(one["table"], one["company"], one["rows"], one["bytes"]) for one in result["tally"]],
    )
    print_left(result["left"])
    for finding in result["findings"]:
        click.echo(f"unkept: {finding['what']} ({finding['table']}, company {finding['company']}, {finding['rows']})")
    if result["waiting"]:
        click.echo(f"rests: {result['waiting']}")
    for kind, seconds in sorted(result["waits"].items()):
        if seconds:
            click.echo(f"rested {number(seconds)} s: {kind}")
    if result["receipt"]:
        click.echo(f"receipt {result['receipt']['seq']}  sha256 {result['receipt']['hash']}")
    if result["anchor"]:
        until = result["anchor"]["locked_until"]
        click.echo(f"anchor {result['anchor']['key']}" + (f", locked until {until}" if until else ""))


def print_look(look: Look) -> None:
    """Rows that the next runs would take and so far would not, and the jobs of which that cannot be told."""
    click.echo(f"the next runs would take {number(sum(one['rows'] for one in look.doomed))} rows more")
    if look.doomed:
        header = ("job", "table", "company", "rows")
        print_rows(header, [[one[name] for name in header] for one in look.doomed])
    for one in look.refused:
        click.echo(f"cannot be told of {one['job']}, as runs would be refused: {one['why']}")


def print_left(left: Sequence[dict[str, Any]]) -> None:
    """Rows that stay, by reason."""
    reasons: dict[tuple[str, str], int] = {}
    for one in left:
        reasons[one["table"], one["reason"]] = reasons.get((one["table"], one["reason"]), 0) + one["rows"]
    for (table, reason), rows in sorted(reasons.items()):
        click.echo(f"stays: {number(rows)} rows of {table}, {reason}")
