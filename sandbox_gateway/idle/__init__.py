"""Carrying out the idle policy: looks at the sandboxes that this process owns and does what
:mod:`sandbox_gateway.policy` decides.

Each sandbox whose profile has a time for anything has one task, which sleeps until its next decision can fall due;
without such a profile nothing runs at all. What a running kernel does is asked for only as often as its times need.
"""

from __future__ import annotations

from sandbox_gateway.idle.driver import IdleDriver
from sandbox_gateway.idle.policies import Policies
from sandbox_gateway.idle.world import Abilities, Reading, World

__all__ = ["Abilities", "IdleDriver", "Policies", "Reading", "World"]
