"""``python -m segbundles``, the same as the command ``segbundles``."""

from segbundles.cli import main

main()
