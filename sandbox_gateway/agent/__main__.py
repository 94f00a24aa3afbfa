"""``python -I -m sandbox_gateway.agent``."""

from __future__ import annotations

import sys

from sandbox_gateway.agent.main import main

sys.exit(main())
