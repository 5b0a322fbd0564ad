"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a flag, a file or a folder. One line says what is wrong, where, and what to do.

    Scripts print it and leave with exit code 2; see ``utils.cli.run_script``.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # what torch or Pillow said may have many lines
