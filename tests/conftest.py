"""What every test runs under: no model hub, threads that leave the machine to others, Ctrl-C."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell that starts a job in the background makes it ignore SIGINT, and so all of its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
