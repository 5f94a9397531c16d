"""`python -m aiolora` is the command `aiolora`."""

from aiolora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
