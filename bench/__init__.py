"""Benchmarks of the sandboxed kernel beside the plain ipykernel, in one run on one machine.

``make bench`` runs ``python -m bench``, which prints a table and writes ``docs/bench/latest.json`` and a picture.
"""
