"""`python -m unfool` is the command `unfool`."""

from unfool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
