"""What the server that the corpus' workers are forked from imports before all else.

A Ctrl-C reaches every process of the terminal, and is the first one's business, which ends the
workers. One that ended by itself, while it held the lock of the pool's queue, would leave the first
process waiting for that lock for ever.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
