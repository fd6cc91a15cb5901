"""Patches to Megatron-LM: unified diffs with headers, listed in ``index.toml``; see ``docs/patches.md``."""
