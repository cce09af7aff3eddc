"""The one error a user is meant to read."""


class UserError(Exception):
    """Bad input: a file, a folder, a key or a value. The command line prints the message as one line and exits with 2.

    The message names the file or the key, what was found and what was expected.
    """
