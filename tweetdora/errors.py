"""The one exception that scripts show as a message without a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found, what was expected and what to do."""
