"""The three errors of the package, and the exit code that each one has on the command line."""


class UserError(Exception):
    """Something that the user can correct: the message says what was asked, what was found, and what to do. Exit code
    1."""


class AttackFails(UserError):
    """An adaptive attack that cannot be made against this scorer, model and pool: a result in a bench, an error in a
    single run."""


class DefenceError(RuntimeError):
    """A defence that cannot run. It stops the run; it is never a warning. Exit code 2."""
