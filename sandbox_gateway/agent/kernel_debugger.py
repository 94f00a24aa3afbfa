"""debugpy when somebody debugs, not before; runs in the kernel's process.

ipykernel imports it at its start: a fifth of the memory of an idle kernel and of the time to start one. All that it
needs before a debugging session are a few names in one module, which is executed again when they are wanted. Beside
:mod:`sandbox_gateway.agent.ipykernel_app`; standard library only.
"""

from __future__ import annotations

import sys
from importlib import import_module, reload
from importlib.util import find_spec
from typing import Any

_MODULE = "ipykernel.debugger"
_NAMES = ("Debugger", "VariableExplorer", "_is_debugpy_available")


def defer() -> bool:
    """Let ipykernel believe that debugpy is imported; False, with nothing changed, where it cannot be told so."""
    if {_MODULE, "debugpy"} & set(sys.modules) or find_spec("debugpy") is None:
        return False
    sys.modules["debugpy"] = None  # type: ignore[assignment]  # its import fails as if there were none
    try:
        module: Any = import_module(_MODULE)
    except Exception:  # an ipykernel that we do not know
        _forget()
        return False
    finally:
        sys.modules.pop("debugpy", None)
    if not all(hasattr(module, name) for name in _NAMES) or module._is_debugpy_available:
        _forget()
        return False
    module._is_debugpy_available = True
    module.VariableExplorer = DeferredExplorer
    return True


def _forget() -> None:
    sys.modules.pop(_MODULE, None)
    vars(sys.modules["ipykernel"]).pop("debugger", None)


class DeferredExplorer:
    """In the place of ``ipykernel.debugger.VariableExplorer`` until one of its methods is called."""

    def __init__(self) -> None:
        self._explorer: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._explorer is None:
            module: Any = sys.modules[_MODULE]
            if module.VariableExplorer is DeferredExplorer:
                module = reload(module)  # objects of its classes see the names that are added
            self._explorer = module.VariableExplorer()
        return getattr(self._explorer, name)
