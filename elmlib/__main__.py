"""`python -m elmlib` is `elm`."""

from elmlib.cli import main

main()
