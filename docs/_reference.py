"""Reference pages made from the code: the argument parser, the profiles' JSON Schema, the error table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from sandbox_gateway.cli.main import parser
from sandbox_gateway.errors import ERRORS
from sandbox_gateway.profiles import BUILT_IN, schema

VARIABLES = {
    "SANDBOX_GATEWAY_HOME": "Where everything is stored; default `~/.local/share/sandbox_gateway`.",
    "SANDBOX_GATEWAY_RUNSC": "Another runsc than the installed one: a path, or a word that is looked up on `PATH`.",
    "SANDBOX_GATEWAY_RELEASES": "A mirror of gVisor's releases for `jupyter sandbox setup`, or `none` to build from "
    "source at once.",
    "SANDBOX_GATEWAY_DEBUG": "`1` shows logs and tracebacks on the command line.",
    "SANDBOX_ID": "Set inside the kernel: the id of its sandbox, which is the kernel's id.",
}


def command_line() -> str:
    """Every command with its arguments."""
    return "\n".join(_commands(parser()))


def _commands(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                yield from _command(sub)


def _command(command: argparse.ArgumentParser) -> Iterator[str]:
    nested = list(_commands(command))
    if nested:
        yield from nested
        return
    command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    yield f"## `{command.prog}`\n"
    yield f"```text\n{command.format_help().strip()}\n```\n"


def profile_keys() -> str:
    """The keys of a profile and of the settings, by the schema that checks them."""
    defs = schema()["$defs"]
    lines = [*_keys(defs["profile"], defs), "", "Built in:", ""]
    lines += [f"- `{profile.name}` (“{profile.display_name}”): {profile.description}" for profile in BUILT_IN.values()]
    lines += ["", "One table `[settings]` holds for the whole installation:", "", *_keys(defs["settings"], defs)]
    return "\n".join(lines) + "\n"


def _keys(table: dict[str, Any], defs: dict[str, Any]) -> Iterator[str]:
    yield from ("| key | what | values |", "|---|---|---|")
    for name, rule in _flat(table, defs):
        yield f"| `{name}` | {_cell(rule.get('title', ''))} | {_cell(_values(rule, defs))} |"


def _flat(table: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys of a table and, dotted, those of tables in it."""
    for key, rule in table["properties"].items():
        yield key, rule
        if "properties" in rule:
            yield from ((f"{key}.{inner}", nested) for inner, nested in _flat(rule, defs))


def _values(rule: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in rule and "description" not in rule:
        rule = {**defs[rule["$ref"].rsplit("/", 1)[1]], **rule}
    if "enum" in rule:
        return " or ".join(f"`{json.dumps(value)}`" for value in rule["enum"])
    return str(rule.get("description", rule.get("type", "")))


def error_table() -> str:
    """The error table."""
    lines = ["| code | HTTP status | meaning | what to do |", "|---|---|---|---|"]
    lines += [f"| `{code}` | {row.status} | {_cell(row.title)} | {_cell(row.hint)} |" for code, row in ERRORS.items()]
    return "\n".join(lines) + "\n"


def environment_keys() -> str:
    """The environment variables."""
    lines = ["| variable | meaning |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {_cell(text)} |" for name, text in VARIABLES.items())]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
