"""`python -m bayespass` is the command `bayespass`."""

from bayespass.cli.app import main

main()
