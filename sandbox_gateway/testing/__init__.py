"""Public helpers for tests: the fake runtime with its faults, and the contract that every runtime must pass."""
