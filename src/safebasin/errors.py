"""The errors of the package, and the exit code that each one has on the command line."""


class UserError(Exception):
    """Something that the user can mend: the message says what was asked, what was found, and what to do. Exit code
    1."""


class AttackFails(UserError):
    """An adaptive attack that cannot be made against this scorer, model and pool: a result in a bench, an error in a
    single run."""


class DefenceError(RuntimeError):
    """A defence that cannot run. It stops the run; it is never a warning. Exit code 2."""


class Terminated(BaseException):
    """SIGTERM came: the run ends cleanly, and the same command goes on from where it was. Exit code 143."""


def exit_code(error: BaseException | None) -> int:
    """The exit code of a run that an error ended; 0 for none."""
    codes = {UserError: 1, KeyboardInterrupt: 130, Terminated: 143}
    return 0 if error is None else next((code for kind, code in codes.items() if isinstance(error, kind)), 2)
