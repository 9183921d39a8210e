"""Sparse attention operations for JAX, one folder an operation.

`<op>/api.py` is the one function to call, `<op>/reference.py` its definition in XLA. Nothing is
imported here, so that importing one operation never loads another.
"""
