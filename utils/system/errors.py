"""Errors that the user can fix."""


class InputError(ValueError):
    """Invalid user input; the message states what is wrong and what to do.

    `cli.run` treats every ValueError raised in Thaw's own code as such. This class marks errors that arrive through a
    library, such as those a DataLoader re-raises from a worker process: as one message, the worker's traceback followed
    by the original message, of which the latter is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
