"""What the server that the corpus' workers are forked from imports before all else.

A Ctrl-C reaches every process of the terminal: workers end at once and say nothing, which the
first process does for all of them.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
