"""``python -m vlmtune.testing``."""

from vlmtune.testing import main

if __name__ == "__main__":
    raise SystemExit(main())
