"""``python -m sandbox_gateway.cli``: the same as ``jupyter sandbox``."""

from sandbox_gateway.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
