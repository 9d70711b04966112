"""Reads flags and arguments of plain types without pydantic.

typer 0.29 builds a pydantic adapter for every parameter of the command that runs, used or not. Importing pydantic for
that cost 100 ms of `formation ps` (-X importtime, which itself slows imports down). What is not plain, or a typer that
keeps its parameters differently, falls back to the way of typer itself. The messages become ours as well.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup


class PlainCommand(TyperCommand):
    """A command whose plain parameters are read here."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, with plain readers in place."""
        return _with_readers(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group whose plain parameters are read here."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, with plain readers in place."""
        return _with_readers(super().get_params(ctx))


def _with_readers(parameters: Any) -> Any:
    for parameter in parameters:
        reader = _reader_of(getattr(getattr(parameter, "type_descriptor", None), "annotation", None))
        if reader is not None and getattr(parameter, "_runtime_param", ...) is None:
            # The attribute where typer itself keeps the reader once it is built.
            vars(parameter)["_runtime_param"] = reader
    return parameters


class _Reader:
    """Stands in for typer's RuntimeParam."""

    def __init__(self, read: Callable[[Any], Any], *, is_list: bool) -> None:
        self._read = read
        self._is_list = is_list

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """The typed value of what was given; None and () for nothing, as typer has it.

        Raises:
          BadParameter: it is not of that type.
        """
        try:
            if self._is_list:
                return [self._read(item) for item in value] if value else ()
            return None if value is None else self._read(value)
        except ValueError as exc:
            raise typer.BadParameter(str(exc), ctx=ctx, param=param) from exc


def _reader_of(annotation: Any) -> _Reader | None:
    is_list = get_origin(annotation) is list
    inner = get_args(annotation)[0] if is_list else annotation
    read: Callable[[Any], Any] | None = None
    if inner is bool and not is_list:
        read = _flag
    elif inner is str or inner is Path:
        read = inner
    elif inner is int:
        read = _whole_number
    elif get_origin(inner) is Literal:
        read = _choice({str(choice): choice for choice in get_args(inner)})
    elif isinstance(inner, type) and issubclass(inner, Enum):
        read = _choice({str(member.value): member for member in inner})
    return _Reader(read, is_list=is_list) if read is not None else None


def _flag(value: Any) -> bool:
    """A flag's value, which the parser has made a bool of already."""
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:60]!r} is not a flag's value")
    return value


def _whole_number(value: Any) -> int:
    try:
        return int(value)
    except ValueError as exc:
        raise ValueError(f"{str(value)[:60]!r} is not a whole number") from exc


def _choice(choices: dict[str, Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        text = str(value.value if isinstance(value, Enum) else value)
        if text not in choices:
            raise ValueError(f"{text[:60]!r} is not one of {', '.join(choices)}")
        return choices[text]

    return read
