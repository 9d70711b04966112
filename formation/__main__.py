"""`python -m formation` is the command `formation`."""

from formation.cli.main import main

main()
