"""The command line, as `python -m niwaki`."""

from niwaki.cli.app import main

main()
