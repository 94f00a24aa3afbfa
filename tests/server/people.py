"""A gateway for several users, and its users: each with a token of his own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acceptance import Product
from served import Served, running


def token(product: Product, name: str, *options: str) -> str:
    """Make a token for a user, as an administrator does."""
    done = product.command("token", "add", name, "--json", *options)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["token"])


def revoke(product: Product, name: str) -> None:
    """Take all of a user's tokens back."""
    done = product.command("token", "rm", name)
    assert done.returncode == 0, done.stderr


@contextmanager
def gateway_for_users(product: Product, log: Path, *options: str) -> Iterator[Served]:
    """A running gateway whose users have tokens; what it is asked without one is asked by an administrator."""
    served = Served(log, "--users", *options, token=token(product, "root", "--admin"))
    with running(served):
        yield served
