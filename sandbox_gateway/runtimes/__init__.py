"""What makes sandboxes: one module per runtime behind the protocol of ``base``."""
