"""The wire: frames, messages, handshake and reliability of the link, without any I/O.

Standard library only, and nothing else of this package: it is copied flat into the agent's layer. Malformed input
raises :class:`~sandbox_gateway.wire.frames.WireError` and nothing else. Begin with
:mod:`sandbox_gateway.wire.endpoint`.
"""
