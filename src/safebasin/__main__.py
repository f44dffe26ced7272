"""``python -m safebasin``: what launchers of several processes call."""

from safebasin.cli.main import main

main()
