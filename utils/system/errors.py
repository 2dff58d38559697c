"""Errors that a user causes and can mend."""


class InputError(ValueError):
    """Something that the user gave can't be used; the message names it and the remedy.

    Any error of `nets/`, `utils/` and the scripts is taken for one of these. This class is for those that arrive by
    way of a library, as from a worker process, which raises them anew.
    """
