"""``python -m seodang``."""

from seodang.cli import main

main()
