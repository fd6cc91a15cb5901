"""``python -m megatron_disagmoe`` is the ``disagmoe`` command."""

from megatron_disagmoe.cli import main

if __name__ == "__main__":
    main()
