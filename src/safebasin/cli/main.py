"""The command line: every arrow between two files is a verb, and ``run`` is all of them. The modules of the verbs
import torch when they are called, so that ``--help`` comes at once.

Exit codes: 0 ok, 1 configuration or user error, 2 run-time error, 3 gate failed, 4 inconclusive, 130 interrupted, 143
terminated.
"""

import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import cyclopts

from safebasin.console import printable
from safebasin.data.files import masked
from safebasin.errors import DefenceError, UserError
from safebasin.events import close_log

app = cyclopts.App(
    name="safebasin",
    version=lambda: __import__("safebasin").__version__,
    help="Fine-tune a language model without losing its safety alignment, and prove it.",
    help_epilogue=(
        "Exit codes: 0 ok, 1 configuration or user error, 2 run-time error, 3 gate failed, 4 inconclusive.\n\n"
        "Threat model: the defender runs the training. Nothing here stops somebody who owns open weights."
    ),
    default_parameter=cyclopts.Parameter(negative=""),  # no --no-json, no --empty-judge
)
VERBS = {  # and the module of ``safebasin.cli`` that has each
    "init": "about",
    "list": "about",
    "schema": "about",
    "doctor": "about",
    "preview": "rows",
    "scan": "rows",
    "cut": "rows",
    "convert": "rows",
    "run": "run",
    "train": "run",
    "search": "run",
    "bench": "run",
    "measure": "measure",
    "repair": "repair",
    "role": "repair",
    "report": "report",
    "gate": "report",
    "export": "export",
    "serve": "serve",
}
for _name, _module in VERBS.items():
    app.command(getattr(import_module(f"safebasin.cli.{_module}"), f"{_name}_verb"), name=_name)


class Terminated(BaseException):
    """SIGTERM came: the run ends cleanly, and the same command goes on from where it was."""


def guarded(action: Callable[[], Any]) -> int:
    """Run an action and give its exit code. Whatever goes wrong is one line on the standard error."""
    try:
        code = int(action() or 0)
        close_log(code)
        return code
    except cyclopts.CycloptsError:  # it has said what is wrong
        return 1
    except UserError as error:
        return _say(str(error), 1)
    except DefenceError as error:
        return _say(f"the run was stopped: {error}", 2)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on", 130)
    except Terminated:
        return _say("terminated; run the same command again to go on", 143)
    except BrokenPipeError:  # the reader of the output has gone: `safebasin list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        close_log(0)
        return 0
    except Exception as error:  # the last catch: what nobody foresaw leaves one line, and its traceback in a file
        file, path = tempfile.mkstemp(prefix="safebasin-", suffix=".log", text=True)
        with open(file, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(masked(traceback.format_exc()))
        lines = str(error).strip().splitlines()
        return _say(f"{type(error).__name__}: {lines[0] if lines else 'no message'} (traceback: {path})", 2)


def _say(text: str, code: int) -> int:
    """One line on the standard error: hostile characters escaped, secrets masked."""
    close_log(code, masked(text))
    print(f"safebasin: {printable(masked(text), 2000)}", file=sys.stderr)
    return code


def terminate_cleanly() -> None:
    """From now on SIGTERM ends what is going on by ``Terminated``."""

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the clean stop
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    terminate_cleanly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 shows escapes
            stream.reconfigure(errors="backslashreplace")
    sys.exit(guarded(lambda: app(result_action="return_value", exit_on_error=False)))
