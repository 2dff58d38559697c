"""Errors that the user can fix."""


class InputError(ValueError):
    """Invalid user input; the message states what is wrong and what to do.

    `cli.run` treats every ValueError raised in Thaw's own code as such. This class marks errors that arrive through a
    library, such as those a DataLoader re-raises from a worker process.
    """
