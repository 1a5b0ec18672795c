"""Guiderail's kernels: each operation has a Triton and a torch path of the same semantics.

Imported as `guiderail.kernels` only: a bare top-level `kernels` on sys.path would be taken by
transformers for the Hub's package of that name (tests/test_layout.py).
"""
