"""The keeper: a detached process that owns sandboxes which no application owns; and asking whoever owns one.

A command that leaves a live sandbox without an application (``resume``, ``fork``, ``connect``) needs a process that
holds its lock and its endpoints: the keeper, one per user and installation, started when it is needed. It ends when it
has owned nothing for a moment, and hands a sandbox over to any process of the same user that asks (DESIGN 4.8).

Its lock is that of ``<runtime>/owners/keeper``, a directory of its own, which tells where it answers.
"""

from __future__ import annotations

from sandbox_gateway.keeper.driving import drive, fork, spawn, take_over
from sandbox_gateway.keeper.start import ask_keeper, ensure_keeper, keeper_directory, keeper_log, keeper_pid

__all__ = [
    "ask_keeper",
    "drive",
    "ensure_keeper",
    "fork",
    "keeper_directory",
    "keeper_log",
    "keeper_pid",
    "spawn",
    "take_over",
]
