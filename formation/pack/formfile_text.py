"""The words of a Formfile line: where each stands, and how quotes work.

Places are 1-based lines and columns, counted in characters, as editors count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from formation.core.errors import UsageError

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something stands in a file."""

    path: str
    line: int
    column: int

    def error(self, expected: str, *, hint: str = "") -> UsageError:
        """`path:line:column: expected …`, to be raised."""
        return UsageError(f"{self.path}:{self.line}:{self.column}: {expected}", hint=hint)

    def at(self, column: int) -> Place:
        """Another column of the line."""
        return Place(path=self.path, line=self.line, column=column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A piece of a line."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A directive and what follows it on its line."""

    directive: Word
    rest: str
    """Without surrounding blanks."""
    rest_place: Place

    def words(self) -> list[Word]:
        """The rest, split at blanks; quotes mean nothing."""
        start = self.rest_place.column
        return [Word(text=m[0], place=self.rest_place.at(start + m.start())) for m in _WORD.finditer(self.rest)]

    def quoted_words(self) -> list[Word]:
        """The rest as shell words.

        Raises:
          UsageError: a quote that is not closed, or a backslash at the end.
        """
        return quoted_words(self.rest, self.rest_place)


def quoted_words(text: str, place: Place) -> list[Word]:
    """Split as a POSIX shell does, with its quotes and backslashes, and without its expansions.

    Raises:
      UsageError: a quote that is not closed, or a backslash at the end.
    """
    words: list[Word] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        start = at
        word, at = _one_word(text, at, place)
        words.append(Word(text=word, place=place.at(place.column + start)))
    return words


def _one_word(text: str, at: int, place: Place) -> tuple[str, int]:
    letters: list[str] = []
    while at < len(text) and not text[at].isspace():
        letter = text[at]
        if letter == "'":
            close = text.find("'", at + 1)
            if close < 0:
                raise _unclosed(place, at)
            letters.append(text[at + 1 : close])
            at = close + 1
        elif letter == '"':
            piece, at = _double_quoted(text, at, place)
            letters.append(piece)
        elif letter == "\\":
            if at + 1 >= len(text):
                raise place.at(place.column + at).error(
                    "expected a character after the backslash", hint="a directive stands on one line"
                )
            letters.append(text[at + 1])
            at += 2
        else:
            letters.append(letter)
            at += 1
    return "".join(letters), at


def _double_quoted(text: str, start: int, place: Place) -> tuple[str, int]:
    letters: list[str] = []
    at = start + 1
    while at < len(text):
        letter = text[at]
        if letter == '"':
            return "".join(letters), at + 1
        if letter == "\\" and text[at + 1 : at + 2] in ('"', "\\", "$", "`"):
            at += 1
            letter = text[at]
        letters.append(letter)
        at += 1
    raise _unclosed(place, start)


def _unclosed(place: Place, at: int) -> UsageError:
    return place.at(place.column + at).error(
        "expected the quote that opens here to be closed", hint="a directive stands on one line"
    )
