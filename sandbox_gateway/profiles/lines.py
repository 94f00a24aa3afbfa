"""Where each key of a TOML document is: ``tomllib`` keeps no lines."""

from __future__ import annotations

import re
import tomllib

Key = tuple[str | int, ...]
"""Where a value is: ``("profiles", "big", "mounts", 0, "source")``."""


def key_lines(text: str) -> dict[Key, int]:
    """The line of every table, key and array item of a *valid* TOML document (``tomllib`` keeps none)."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    """Walks valid TOML just closely enough to know where each key is."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Key, int] = {}
        self._counted = 0
        self._line = 1
        self._arrays: dict[Key, int] = {}

    def document(self) -> None:
        table: Key = ()
        while True:
            self._skip(newlines=True)
            if self.at >= len(self.text):
                return
            if self._take("[["):
                table = self._array_table()
            elif self._take("["):
                table = self._under_arrays(self._key())
                self._note(table)
                self._skip()
                self._take("]")
            else:
                self._pair(table)

    def _array_table(self) -> Key:
        base = self._under_arrays(self._key())
        index = self._arrays.get(base, -1) + 1
        self._arrays[base] = index
        self._note(base)
        self._note((*base, index))
        self._skip()
        self._take("]]")
        return (*base, index)

    def _under_arrays(self, key: Key) -> Key:
        """``[a.b]`` after ``[[a]]`` means the last item of ``a``."""
        full: Key = ()
        for part in key[:-1]:
            full = (*full, part)
            if full in self._arrays:
                full = (*full, self._arrays[full])
        return (*full, key[-1])

    def _pair(self, table: Key) -> None:
        key = (*table, *self._key())
        for length in range(len(table) + 1, len(key) + 1):
            self._note(key[:length])
        self._skip()
        self._take("=")
        self._skip()
        self._value(key)

    def _key(self) -> Key:
        parts: list[str] = []
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                start = self.at
                self._string()
                quoted = self.text[start : self.at]
                parts.append(tomllib.loads(f"k = {quoted}")["k"] if quoted[0] == '"' else quoted[1:-1])
            else:
                bare = re.compile(r"[A-Za-z0-9_-]+").match(self.text, self.at)
                if bare is None:
                    raise ValueError(f"no key at offset {self.at}")
                parts.append(bare[0])
                self.at = bare.end()
            self._skip()
            if not self._take("."):
                return tuple(parts)

    def _value(self, key: Key) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self.at += 1
            index = 0
            while not self._closed("]"):
                self._note((*key, index))
                self._value((*key, index))
                index += 1
        elif opening == "{":
            self.at += 1
            while not self._closed("}"):
                self._pair(key)
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}\n#":
                self.at += 1

    def _closed(self, closing: str) -> bool:
        """Skip to the next item of an array or inline table; True at its end."""
        self._skip(newlines=True)
        self._take(",")
        self._skip(newlines=True)
        return self._take(closing)

    def _string(self) -> None:
        mark = self.text[self.at]
        triple = self.text.startswith(mark * 3, self.at)
        end = mark * 3 if triple else mark
        self.at += len(end)
        while not self.text.startswith(end, self.at):
            self.at += 2 if mark == '"' and self.text[self.at] == "\\" else 1
        self.at += len(end)
        while triple and self.at < len(self.text) and self.text[self.at] == mark:
            self.at += 1  # a multi-line string may end with one or two marks of its own

    def _skip(self, newlines: bool = False) -> None:
        blank = " \t\n" if newlines else " \t"
        while self.at < len(self.text):
            if self.text[self.at] in blank:
                self.at += 1
            elif newlines and self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def _take(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def _note(self, key: Key) -> None:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        self.lines.setdefault(key, self._line)
