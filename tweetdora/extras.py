"""Optional packages."""

from collections.abc import Sequence
from importlib.util import find_spec

from tweetdora.errors import InputError


def check_installed(flag: str, extra: str, modules: Sequence[str]) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Raises:
        InputError: names the missing packages and the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{flag} needs packages that are not installed ({', '.join(missing)}). Install them with "
            f"pip install -r requirements-{extra}.txt, or pip install tweetdora[{extra}]."
        )
