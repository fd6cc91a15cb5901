"""The main job in small: real text, real processes, Megatron's own loop. ``scripts/quickstart.sh`` runs it."""
