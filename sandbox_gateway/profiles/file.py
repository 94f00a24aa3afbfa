"""Reading the profile file: TOML, with the line of everything that is wrong in it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.profiles.lines import Key, key_lines
from sandbox_gateway.profiles.schema import faults, shorten, show

MAX_FILE = 1024 * 1024
"""Bytes; a longer profile file is refused."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a profile file."""

    file: str
    line: int
    """Counted from 1."""
    key: str
    """Dotted, as in ``profiles.big.memory``; empty for a syntax error."""
    value: str
    """What was given, as TOML would write it, shortened; empty where there is none."""
    message: str
    """What is wrong and what is allowed."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: "
        return place + (f"{self.key}: {self.message}" if self.key else self.message)


class ProfileError(SandboxGatewayError):
    """``invalid_profile`` with every problem of the file; the message has one line for each."""

    def __init__(self, problems: Sequence[Problem], hint: str | None = None) -> None:
        super().__init__("invalid_profile", "\n".join(str(problem) for problem in problems), hint)
        self.problems = tuple(problems)

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON, with ``problems`` as a list of objects."""
        return {**super().as_dict(), "problems": [asdict(problem) for problem in self.problems]}


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """A parsed and schema-checked profile file."""

    path: str
    tables: Mapping[str, Mapping[str, Any]]
    """Profile name -> its table."""
    lines: Mapping[Key, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What holds for all profiles."""

    def problem(self, key: Key, message: str, value: Any = None) -> Problem:
        """A problem at ``key``, with the line of the nearest key that has one."""
        return Problem(self.path, _line(self.lines, key), dotted(key), "" if value is None else show(value), message)


def read(path: Path) -> ProfileFile | None:
    """Parse and check ``path``; None when there is no such file. Raises :class:`ProfileError` with all problems."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ProfileError([Problem(str(path), 1, "", "", f"cannot be read: {error.strerror}")]) from error
    return parse(raw, str(path))


def parse(raw: bytes, name: str) -> ProfileFile:
    """Parse the bytes of a profile file called ``name``; raises :class:`ProfileError` with all problems."""
    if len(raw) > MAX_FILE:
        raise ProfileError([Problem(name, 1, "", "", f"longer than {MAX_FILE} bytes")])
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ProfileError([Problem(name, line, "", "", f"not UTF-8 (byte {error.start})")]) from error
    try:
        data = tomllib.loads(text)
        lines = key_lines(text)
        wrong = faults(data)
    except ValueError as error:  # TOMLDecodeError, and int()'s own for a number of thousands of digits
        raise ProfileError([_syntax(name, text, error)], "Correct the TOML syntax; see https://toml.io.") from error
    except RecursionError as error:
        raise ProfileError([Problem(name, 1, "", "", "nested too deeply")]) from error
    if wrong:
        raise ProfileError(
            [
                Problem(name, _line(lines, it.key), dotted(it.key), show(it.value) if it.valued else "", it.text)
                for it in wrong
            ]
        )
    return ProfileFile(name, data.get("profiles", {}), lines, data.get("settings", {}))


def _syntax(name: str, text: str, error: ValueError) -> Problem:
    message = str(error)
    where = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if where is None:
        return Problem(name, 1, "", "", f"TOML syntax: {message}")
    line = int(where[1]) if where[1] else text.count("\n") + (not text.endswith("\n"))
    given = text.split("\n")[line - 1].strip() if line <= text.count("\n") + 1 else ""
    return Problem(name, max(line, 1), "", shorten(given), f"TOML syntax: {message[: where.start()]}: {shorten(given)}")


def dotted(key: Key) -> str:
    """``profiles.big.mounts[0].source``."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part, ensure_ascii=False)
            text += f".{name}" if text else name
    return text


def _line(lines: Mapping[Key, int], key: Key) -> int:
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)
