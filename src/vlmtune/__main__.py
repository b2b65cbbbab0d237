"""``python -m vlmtune``, as launchers such as torchrun start it."""

from vlmtune.cli.main import main

if __name__ == "__main__":
    main()
