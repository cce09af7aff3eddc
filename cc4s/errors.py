"""The errors that are part of the interface."""


class UserError(Exception):
    """Bad input: a file, a folder, a key or a value. The command line prints the message as one line and exits with 2.

    The message names the file or the key, what was found and what was expected.
    """


class OutOfTime(Exception):
    """A deadline came before the end; what is done is on disk, and the same call goes on from there."""
