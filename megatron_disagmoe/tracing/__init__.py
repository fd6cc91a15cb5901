"""Traces: what each rank did and when, and what that says about a step.

``recorder`` and ``clock`` run inside training and import neither torch nor Megatron; ``merge``, ``report``
and ``chart`` read the files afterwards. Formats and definitions: docs/traces.md.
"""
