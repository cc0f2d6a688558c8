"""The command line, as `python -m niwaki.cli`."""

from niwaki.cli.app import main

main()
