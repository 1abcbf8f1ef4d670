"""Errors that the user can fix. Each kind ends a script with a message, no traceback, and its own exit status."""


class UserError(Exception):
    """An error that the user can fix; the message says what was found, what was expected and what to do."""

    exit_status = 1


class InputError(UserError):
    """A flag, recipe, record, data set or model is invalid."""

    exit_status = 2  # like argparse


class ResourceError(UserError):
    """The disk is full, or permissions are missing."""

    exit_status = 3


class DivergedError(UserError):
    """The training loss or a gradient is NaN or infinite."""

    exit_status = 4


class HubError(UserError):
    """The Hugging Face Hub cannot be reached, or refuses a request."""

    exit_status = 5


class VerificationError(UserError):
    """The saved or published model does not answer like the trained one."""

    exit_status = 6
