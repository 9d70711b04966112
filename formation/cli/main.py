"""Entry point: runs a command and turns whatever happens into an exit status and words on stderr.

| status | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | usage |
| 3 | node unreachable |
| 4 | denied |
| 5 | not found |
| 6 | conflict |
| 7 | quorum or timeout: trying again can help |
| 8 | accepted, not waited for |
| 130 | interrupted |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

from formation.core.errors import EXIT_INTERRUPTED, FormationError

_GROUPS = ("vm", "image", "key", "account", "grant", "value", "claim", "network", "voter", "state", "op")
_JSON_FORMS = ("json", "jsonl")


def main() -> NoReturn:
    """Run the process's command line and leave with its exit status."""
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit status.

    Args:
      argv: arguments without the program's name.
    """
    arguments = list(argv)
    try:
        return _run(arguments)
    except FormationError as error:
        if "--debug" in arguments:
            _print_traceback()
        cause = f"{error.__cause__}" if error.__cause__ is not None else ""
        _report(arguments, error.code, error.message, cause=cause, hint=error.hint)
        return error.exit_status
    except KeyboardInterrupt:
        _report(arguments, "interrupted", "interrupted", hint="")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; writing on, even at exit, would only complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the outermost boundary: people get a sentence, --debug gets the traceback
        if "--debug" in arguments:
            _print_traceback()
        _report(
            arguments,
            "failed",
            f"something that should not happen: {type(error).__name__}: {error}",
            hint="please report it, with what the same command says with --debug",
        )
        return 1


def _run(arguments: list[str]) -> int:
    import typer

    from formation.cli.app import make_command

    try:
        result = make_command().main(args=arguments, prog_name="formation", standalone_mode=False)
    except typer.TyperException as error:
        return _report_usage(arguments, error)
    except typer.Abort:
        _report(arguments, "interrupted", "interrupted", hint="")
        return EXIT_INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return result if isinstance(result, int) else 0


def _report_usage(arguments: list[str], error: Exception) -> int:
    message = str(getattr(error, "format_message", error.__str__)()).strip()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else _called(arguments)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(lines).removesuffix(".")
    _report(arguments, "usage", text[:1].lower() + text[1:], hint=f"{command} --help")
    return int(getattr(error, "exit_code", 2))


def _called(arguments: Sequence[str]) -> str:
    """The command that was called, for errors of the parser that do not say."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    return " ".join(["formation", *words[: 2 if words[:1] and words[0] in _GROUPS else 1]])


def _report(arguments: Sequence[str], code: str, message: str, *, hint: str, cause: str = "") -> None:
    from formation.cli.output import paint, printable, to_json_line, wants_color

    if _wants_json(arguments):
        print(to_json_line({"error": {"code": code, "message": message, "hint": hint}}), file=sys.stderr)
        return
    color = wants_color(_color_choice(arguments), sys.stderr, os.environ)
    print(f"{paint('Error:', 'red', color=color)} {printable(message)}", file=sys.stderr)
    if cause and "--debug" in arguments:
        print(f"Cause: {printable(cause)}", file=sys.stderr)
    if hint:
        print(f"{paint('Hint:', 'cyan', color=color)} {printable(hint)}", file=sys.stderr)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors are for programs. Read off the raw arguments, because these may be what is wrong."""
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument == "--":
            break
        if argument == "--json" or argument in [f"{o}{f}" for o in ("-o", "-o=", "--output=") for f in _JSON_FORMS]:
            return True
        if argument in ("-o", "--output"):
            return following in _JSON_FORMS
    return os.environ.get("FORMATION_OUTPUT", "") in _JSON_FORMS


def _color_choice(arguments: Sequence[str]) -> str:
    for choice in ("always", "never"):
        if f"--color={choice}" in arguments or ("--color", choice) in pairwise(arguments):
            return choice
    return "auto"


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


if __name__ == "__main__":
    main()
