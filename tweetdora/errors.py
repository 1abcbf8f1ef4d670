"""Errors for the user: each kind ends a script with a message, without a traceback, and with its own exit status."""


class UserError(Exception):
    """Something the user can mend; the message says what was found, what was expected and what to do."""

    exit_status = 1


class InputError(UserError):
    """A flag, recipe, record, data set or model is not what it should be."""

    exit_status = 2  # as of argparse


class ResourceError(UserError):
    """The machine does not give what is needed: room on the disk, or the right to write."""

    exit_status = 3


class DivergedError(UserError):
    """The loss or a gradient of a training is NaN or infinite."""

    exit_status = 4


class HubError(UserError):
    """The Hugging Face Hub cannot be reached, or refuses what it was asked for."""

    exit_status = 5


class VerificationError(UserError):
    """What was saved or published does not answer as the model that was trained."""

    exit_status = 6
