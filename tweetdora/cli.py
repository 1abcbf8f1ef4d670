"""Read flags and recipes into the settings of config.py.

A recipe is a flat YAML file of the same keys as the flags. Flags win over the recipe, the recipe over the defaults:

    accelerate launch train.py --config recipes/quickstart.yaml --learning_rate 1e-4
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging as transformers_logging

from tweetdora.config import DEFAULT_RUN_DIR, ModelConfig, PredictConfig, TaskConfig, flags_of
from tweetdora.errors import InputError, ResourceError, UserError

if TYPE_CHECKING:
    from tweetdora.train_config import TrainConfig

# Full disk, exceeded quota or file size limit, read-only folder.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
Config = TypeVar("Config")
# The installed command for which a script is being imported (entry.py).
command: str | None = None
# Flags that accept a boolean or a word, for which YAML's true is passed on unchanged.
_TRUE_OR_WORD = {"resume_from_checkpoint"}


def parse_train(argv: Sequence[str] | None, description: str) -> "tuple[TaskConfig, ModelConfig, TrainConfig]":
    """Read recipe and flags of train.py.

    Raises:
        InputError: an unknown key, a wrong value or a contradiction.
    """
    from tweetdora.train_config import TrainConfig  # takes seconds, and the other scripts do without it

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser([TaskConfig, ModelConfig, TrainConfig], description)
    parser.add_argument("--help_all", action="store_true", help="Show all flags, including the Trainer's, and exit.")
    if "--help_all" in argv:
        argv = ["--help"]
    else:
        for action in parser._actions:
            if action.dest in _trainer_fields(TrainConfig) - _shown_flags(TrainConfig):
                action.help = argparse.SUPPRESS
    task, model, training, *_ = parser.parse_strictly(with_recipe(parser, argv))
    return task, model, training


def parse_with_target(
    argv: Sequence[str] | None, config_class: type[Config], description: str, target_help: str
) -> tuple[Config, str]:
    """Read the flags of a script that takes one folder or model id; return the flags and the target."""
    parser = _parser([config_class], description)
    parser.add_argument("target", nargs="?", default=DEFAULT_RUN_DIR, help=target_help)
    config, rest = parser.parse_strictly(argv)
    return config, rest.target


def parse_predict(argv: Sequence[str] | None, description: str) -> tuple[PredictConfig, str, str | None]:
    """Read the flags of predict.py; return the flags, the model and the input file (None for standard input)."""
    parser = _parser([PredictConfig], description)
    parser.add_argument("model", help="Run folder, or the folder or Hub id of a model or an adapter.")
    parser.add_argument(
        "input", nargs="?", help="A .csv, .tsv, .jsonl, .parquet or .txt file. Default: standard input."
    )
    config, rest = parser.parse_strictly(argv)
    return config, rest.model, None if rest.input == "-" else rest.input


def parse_with_paths(
    argv: Sequence[str] | None, config_class: type[Config], description: str, name: str, help_text: str
) -> tuple[Config, list[str]]:
    """Read the flags of a script that takes one or more paths, called `name` in its help."""
    parser = _parser([config_class], description)
    parser.add_argument("paths", nargs="+", metavar=name, help=help_text)
    config, rest = parser.parse_strictly(argv)
    return config, rest.paths


def read_task(recipe_path: str | None) -> TaskConfig:
    """Return the task of a recipe, or the published task without one."""
    if recipe_path is None:
        return TaskConfig()
    found = _read_recipe(recipe_path)
    return TaskConfig(**{item.name: getattr(found, item.name) for item in dataclasses.fields(TaskConfig)})


def read_revision(recipe_path: str | None, name: str) -> str | None:
    """Return the revision that a recipe gives for this base model; None if it gives none, or names another model."""
    if recipe_path is None:
        return None
    found = _read_recipe(recipe_path)
    return found.model_revision if found.model_name_or_path == name else None


def _read_recipe(path: str) -> argparse.Namespace:
    from tweetdora.train_config import TrainConfig  # as above

    parser = _parser([TaskConfig, ModelConfig, TrainConfig], "")
    return parser.parse_args(with_recipe(parser, ["--config", path]))


def with_recipe(parser: HfArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return `argv` with the keys of its --config recipe in front as flags: one parser checks both, and flags win.

    >>> with_recipe(parser, ["--config", "r.yaml", "--r", "4"])    # r.yaml: "r: 16" and "target_modules: [q_proj]"
    ['--r=16', '--target_modules', 'q_proj', '--config', 'r.yaml', '--r', '4']
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append")
    given, rest = first.parse_known_args(argv)
    if given.config is None:
        return rest
    if len(given.config) > 1:
        raise InputError(
            f"--config is given {len(given.config)} times ({', '.join(given.config)}); expected one recipe per run."
        )
    path = given.config[0]
    recipe = read_yaml(path, f"--config {path}")
    fields = {action.dest: action for action in parser._actions}
    flags: list[str] = []
    for key, value in recipe.items():
        if key not in fields or key in ("help", "help_all", "config"):
            near = [name for name in difflib.get_close_matches(str(key), fields, n=1) if name != key]
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"{path}: unknown key {key!r}.{hint} Keys are the flags of train.py --help.")
        if value is None:
            if key not in _fields_that_take(type(None), parser):
                raise InputError(f"{path}: {key} is empty (null); set a value or delete the line.")
            parser.set_defaults(**{key: None})
        elif isinstance(value, dict) and key in _fields_that_take(dict, parser):
            flags.append(f"--{key}={json.dumps(value)}")
        else:
            flags += _as_flags(path, key, value, fields[key])
    # --config stays in between, so that a stray word after it does not join the recipe's last list.
    return [*flags, "--config", path, *rest]


def _as_flags(path: str, key: str, value: Any, action: argparse.Action) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for item in values:
        if item is None or isinstance(item, (dict, list)):
            raise InputError(f"{path}: {key} is {value!r}; expected a plain value or a list of plain values.")
        # YAML 1.1 reads an unquoted yes, no, on or off as a boolean.
        if isinstance(item, bool) and action.type is not string_to_bool and action.dest not in _TRUE_OR_WORD:
            raise InputError(f'{path}: {key} holds {item} where a word is expected; put it in quotes, like "no".')
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]


def _fields_that_take(kind: type, parser: HfArgumentParser) -> set[str]:
    hints = [hint for config_class in parser.dataclass_types for hint in get_type_hints(config_class).items()]
    return {name for name, hint in hints if any((get_origin(part) or part) is kind for part in get_args(hint))}


def read_yaml(path: str, shown: str) -> dict[str, Any]:
    """Read a YAML file of keys and values, each key once; messages call it `shown`.

    Raises:
        InputError: the file is missing, or is not such a file.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            recipe = yaml.load(stream, _UniqueKeys)  # a safe loader
    except FileNotFoundError:
        raise InputError(f"{shown}: there is no such file; recipes are in recipes/.") from None
    except OSError as error:  # a folder, or no permission
        raise InputError(f"{shown} cannot be read ({error.strerror}); expected a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{shown} is not readable YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{shown}: expected lines such as 'learning_rate: 3e-5', found {type(recipe).__name__}.")
    return recipe


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; otherwise the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping as SafeLoader does, after checking for duplicate keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} occurs more than once")
        return super().construct_mapping(node, deep)


def check_flags(run_as: str, parse: Callable[[None], Any], name: str, without: Sequence[str] = ()) -> None:
    """Answer --help and refuse wrong flags at once, before a script's other imports, which take seconds.

    run_as: the script's __name__; a script that is imported does not read the flags of whoever imports it.
    without: packages that are imported with the flags' own modules but that flags do not need. They count as not
        installed until the process ends, so give them only for --help.
    """
    if run_as == "__main__" or command:
        for package in without:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # Python's way to block an import
        with _errors_in_words(command or name):
            parse(None)


def run_script(main: Callable[[], int], name: str) -> NoReturn:
    """Run a script's main and exit; errors that the user can fix are printed without a traceback.

    Exit status: that of the UserError (errors.py), 3 if a file could not be written, 130 for Ctrl-C, 1 if another
    process of the launch is gone. For any other error Python prints the traceback and exits with 1.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # for loading and saving weights, which take a second
    # PEFT 0.21 uses a name that transformers 5.23 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    show_log()
    with _errors_in_words(name):
        status = main()
        _leave_process_group()
        sys.exit(status)


@contextlib.contextmanager
def _errors_in_words(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if _wants_traceback(sys.argv[1:]):
            traceback.print_exc()
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        advice = "Fix its permissions" if error.errno in (errno.EROFS, errno.EACCES) else "Free disk space"
        print(f"{name}: {error}. {advice}, or use another folder.", file=sys.stderr)
        sys.exit(ResourceError.exit_status)
    except RuntimeError as error:
        from tweetdora.processes import lost_process

        if _wants_traceback(sys.argv[1:]) or (message := lost_process(error)) is None:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; everything finished before is kept.", file=sys.stderr)
        sys.exit(130)


def _leave_process_group() -> None:
    """End the communication between processes, after a main that succeeded.

    Python may otherwise exit while gloo's threads run, and the process aborts ("terminate called without an active
    exception"). After an error the others may wait in a collective, so the launcher ends them.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _wants_traceback(argv: Sequence[str]) -> bool:
    """True if --traceback is on; parsed separately, because another flag may be invalid."""
    value = next((after for flag, after in zip(argv, [*argv, ""][1:], strict=True) if flag == "--traceback"), "false")
    return "--traceback=true" in argv or value.lower() not in ("false", "no", "0")


def show_log(standard_error: bool = False) -> None:
    """Print the library's log as plain lines to standard output, and warnings to standard error.

    standard_error: print everything there, if standard output is for results.
    """
    logger = logging.getLogger("tweetdora")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_LineHandler(standard_error)]


class _LineHandler(logging.Handler):
    """Print only the message."""

    def __init__(self, standard_error: bool) -> None:
        super().__init__()
        self._standard_error = standard_error

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; look up the streams now, because they may have been redirected."""
        stream = sys.stderr if self._standard_error or record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Format help with full type names, one line per flag, and no meaningless defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [option for option in action.option_strings if "-" not in option[2:]]
        if not shown:
            return super()._format_action_invocation(action)
        value = (
            ""
            if action.nargs == 0
            else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
        )
        return ", ".join(shown) + value

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "value").replace("string_to_bool", "bool")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """An argument parser that raises InputError."""

    def error(self, message: str) -> NoReturn:
        """Override argparse, which would exit here."""
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_strictly(self, argv: Sequence[str] | None) -> tuple[Any, ...]:
        """Return the dataclasses, then a namespace of the other arguments; refuse unknown flags."""
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            if unknown[0].endswith((".yaml", ".yml")) and "--config" in self._option_string_actions:
                self.error(f"unexpected argument {unknown[0]!r}; to use a recipe, write --config {unknown[0]}")
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return tuple(parsed)


def _parser(config_classes: list[Any], description: str) -> _Parser:
    # No abbreviations: a shortened flag could change its meaning when a new flag is added.
    parser = _Parser(config_classes, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    if TaskConfig in config_classes:
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="Recipe: a YAML file of these flags. Flags on the command line take precedence.",
        )
    parser.add_argument(
        "--traceback",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="Show the traceback of an error.",
    )
    # Hide the --no_... twin of each flag; --flag false does the same.
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    return parser


def _trainer_fields(config_class: Any) -> set[str]:
    return {item.name for item in dataclasses.fields(config_class)}


def _shown_flags(config_class: Any) -> set[str]:
    flags = flags_of(config_class)
    declared = set(config_class.__annotations__)  # ours; the others are the Trainer's
    return {name for name in declared if name not in flags or flags[name].shown}
