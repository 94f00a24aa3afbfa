"""PID 1 of a sandbox: starts the kernel under another uid and relays for it over the link.

It runs from a read-only layer of its own and imports the standard library, pyzmq and :mod:`sandbox_gateway.wire` only.
"""
