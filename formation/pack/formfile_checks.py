"""Checks of single words in a Formfile. Each raises UsageError at the word's place."""

from __future__ import annotations

import json
import re

from formation.pack.formfile_directives import example
from formation.pack.formfile_text import Line, Place, Word

PATH_LENGTH_MAX = 1024

USERNAME = re.compile(r"^[a-z_][a-z0-9_-]{0,31}$")
_WHOLE = re.compile(r"^[0-9]{1,9}$")


def one_word(line: Line) -> Word:
    """The only word of a line, quotes meaning nothing."""
    return only_word(line.words(), line)


def only_word(words: list[Word], line: Line) -> Word:
    """The one of these words, if it is one."""
    if len(words) > 1:
        hint = "a comment stands on a line of its own" if words[1].text.startswith("#") else example(line.directive.text)
        raise words[1].place.error(f"expected nothing more after {words[0].text[:40]!r}", hint=hint)
    if not words:
        raise line.rest_place.error("expected a value", hint="quotes hold nothing")
    return words[0]


def whole_number(line: Line, low: int, high: int, unit: str) -> int:
    """The number on a line, within bounds."""
    word = one_word(line)
    if not _WHOLE.match(word.text) or int(word.text) not in range(low, high + 1):
        hint = example(line.directive.text)
        raise word.place.error(f"expected a whole number of {unit} from {low} to {high}, found {word.text[:40]!r}", hint=hint)
    return int(word.text)


def check_limit(place: Place, what: str, count: int, count_max: int) -> None:
    """Refuse one more where the limit is reached."""
    if count >= count_max:
        raise place.error(f"expected at most {count_max} of {what}", hint="put large settings into a file, and COPY it")


def refuse_continuation(line: Line) -> None:
    """Refuse a line that wants to go on below."""
    if line.rest.endswith("\\") and not line.rest.endswith("\\\\"):
        place = line.rest_place.at(line.rest_place.column + len(line.rest) - 1)
        raise place.error(
            "expected the command to end on this line", hint="join the lines with &&, or COPY a script and RUN it"
        )


def absolute_path(word: Word, what: str) -> str:
    """The normal form of an absolute path: no doubled slashes, no `.`."""
    parts = [part for part in word.text.split("/") if part not in ("", ".")]
    if not word.text.startswith("/"):
        raise word.place.error(
            f"expected an absolute path for {what}, found {word.text[:80]!r}", hint=f"write /{'/'.join(parts)}"[:120]
        )
    if ".." in parts or len(word.text) > PATH_LENGTH_MAX:
        raise word.place.error(
            f"expected a path without .. and of at most {PATH_LENGTH_MAX} characters for {what}", hint="write the path out"
        )
    return "/" + "/".join(parts)


def context_path(word: Word) -> str:
    """The normal form of a path inside the build context; `.` for all of it."""
    parts = [part for part in word.text.split("/") if part not in ("", ".")]
    if not word.text or word.text.startswith("/") or ".." in parts or len(word.text) > PATH_LENGTH_MAX:
        raise word.place.error(
            f"expected a path inside the build context, found {word.text[:80]!r}",
            hint="move the file beside the Formfile, and give its relative path",
        )
    return "/".join(parts) or "."


def env_scope(option: Word) -> str:
    """The scope in `--scope=…`."""
    name, _, value = option.text.partition("=")
    if name != "--scope":
        raise option.place.error(f"expected --scope=…, found {option.text[:40]!r}", hint=example("ENV"))
    kind, _, who = value.partition(":")
    if value == "system" or (kind == "user" and USERNAME.match(who)) or (kind == "service" and USERNAME.match(who)):
        return value
    raise option.place.at(option.place.column + len("--scope=")).error(
        f"expected system, user:NAME or service:NAME, found {value[:60]!r}", hint=example("ENV")
    )


def json_words(line: Line) -> list[Word]:
    """The strings of a JSON array."""
    place = line.rest_place
    try:
        items = json.loads(line.rest)
    except json.JSONDecodeError as exc:
        raise place.at(place.column + exc.pos).error(
            f"expected a JSON array of strings: {exc.msg}", hint=example("ENTRYPOINT")
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise place.error("expected a JSON array of strings", hint=example("ENTRYPOINT")) from exc
    # What starts with `[` and parses is a list.
    if not all(isinstance(item, str) for item in items):
        raise place.error("expected a JSON array of strings, found something else in it", hint=example("ENTRYPOINT"))
    for item in items:
        if "\0" in item or re.search(r"[\ud800-\udfff]", item):
            raise place.error("expected text without NUL and half characters", hint="a program's argument can not hold them")
    return [Word(text=item, place=place) for item in items]
