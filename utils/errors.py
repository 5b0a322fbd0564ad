"""How a script stops before its end: bad input, trouble on the way, or a signal."""


class InputError(ValueError):
    """Bad input: a flag, a file or a folder. One line says what is wrong, where, and what to do.

    Scripts print it and leave with exit code 2; see ``utils.cli.run_script``.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # what torch or Pillow said may have many lines


class RunError(RuntimeError):
    """A run that cannot go on: it diverged, or its disk is full. Exit code 1 and one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class Interrupted(BaseException):
    """A signal asked the script to stop. Exit code 128 + its number.

    Like KeyboardInterrupt, it is nobody's to catch on the way.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or "stopped by a signal")
        self.signum = signum
        self.resume_with = ""  # a command line, where there is something to continue
