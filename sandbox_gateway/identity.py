"""What a kernel is given after a restore, so that it is nobody else's copy (DESIGN 4.5, invariant 6).

Values only: the call itself is the agent's operation ``identify``. Nothing here is logged, and nothing is kept.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from sandbox_gateway.model import Launch

ENTROPY_BYTES: Final = 256

STARTUP_PREFIXES: Final = (
    "PYTHON",
    "LD_",
    "MALLOC_",
    "LC_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "GOTO_",
    "BLIS_",
    "VECLIB_",
    "NUMEXPR_",
    "NUMBA_",
    "TBB_",
    "NPY_",
    "NUMPY_",
    "TF_",
    "TORCH_",
    "PYTORCH_",
    "XLA_",
    "JAX_",
    "HF_",
    "TRANSFORMERS_",
    "POLARS_",
    "DASK_",
    "RAY_",
    "IPYTHON",
    "JUPYTER",
    "XDG_",
    "DEBUGPY_",
    "PYDEVD_",
)
"""Beginnings of the names of variables that are read once: by the loader, the interpreter, or a module's import."""

STARTUP_VARIABLES: Final = frozenset(
    {
        "GLIBC_TUNABLES",
        "OPENSSL_CONF",
        "OPENSSL_MODULES",
        "LANG",
        "LANGUAGE",
        "HOME",
        "VIRTUAL_ENV",
        "MPLBACKEND",
        "MPLCONFIGDIR",
        "MATPLOTLIBRC",
        "COVERAGE_PROCESS_START",
        "SETUPTOOLS_USE_DISTUTILS",
        "JPY_PARENT_PID",
    }
)
"""Further names of that kind. ``HOME``: IPython's profile and history lie below it."""

_SECRETS: Final = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIALS", "_KEY")
"""Ends of names that are asked for when they are used; in a template's memory they would be everybody's."""


def acts_at_start(name: str) -> bool:
    """Whether a variable only acts when the interpreter starts or a module is imported: such a one belongs to a
    template's key and cannot be given to a kernel that runs."""
    if name.endswith(_SECRETS):
        return False
    return name in STARTUP_VARIABLES or name.startswith(STARTUP_PREFIXES)


def startup_part(environment: Mapping[str, str]) -> dict[str, str]:
    """Those variables of an environment that act at the start, sorted by name: what a template's key holds of it."""
    return {name: environment[name] for name in sorted(environment) if acts_at_start(name)}


def out_of_reach(template: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """Names of variables in which a kernel restored from ``template``'s environment could not become ``wanted``.

    Where there are any, the kernel has to start cold, and the record says why; names only, never values.
    """
    have, need = startup_part(template), startup_part(wanted)
    return tuple(sorted(name for name in have.keys() | need.keys() if have.get(name) != need.get(name)))


def fresh(launch: Launch) -> dict[str, Any]:
    """The parameters of one call of ``identify``: all of ``launch``'s, with entropy and a session id of their own.

    They hold the kernel's key and environment: to be sent to the agent and forgotten.
    """
    return {
        "env": dict(launch.kernel.environment),
        "cwd": launch.kernel.cwd,
        "key": launch.key.decode("ascii"),
        "session": secrets.token_hex(16),
        "entropy": base64.b64encode(secrets.token_bytes(ENTROPY_BYTES)).decode("ascii"),
        "time": time.time(),
    }
