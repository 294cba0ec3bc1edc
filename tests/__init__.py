"""Tests on real processes, sockets and pseudo-terminals; run with ``python -m unittest`` from the project's root."""

import signal

# A shell's background job ignores Ctrl-C, and so would the programs that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
