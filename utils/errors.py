"""Why a script stops before its end: bad input, a run that cannot go on, or a signal."""


class _OneLine(Exception):
    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # torch and Pillow write several lines


class InputError(_OneLine, ValueError):
    """Bad input: a flag, a file or a folder. One line says what is wrong, where, and what to do.

    Scripts print it and leave with exit code 2; see ``utils.cli.parser.run_script``.
    """


class RunError(_OneLine, RuntimeError):
    """A run that cannot go on: it diverged, or its disk is full. Exit code 1 and one line."""


class Interrupted(BaseException):
    """A signal asked the script to stop. Exit code 128 + its number.

    Like KeyboardInterrupt, it is no Exception, so that ``except Exception`` does not catch it.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or "stopped by a signal")
        self.signum = signum
        self.resume_with = ""  # a command line, if there is a run to continue
