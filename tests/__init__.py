"""Tests on real processes, sockets and pseudo-terminals; run with ``python -m unittest`` from the project's root."""

import os
import signal

# The tests start programs as users do, who have no such variables: PYTHONUNBUFFERED would hide what nobody flushes.
for name in [name for name in os.environ if name.startswith("PYTHON") and name not in ("PYTHONHOME", "PYTHONPATH")]:
    del os.environ[name]

# A shell's background job ignores Ctrl-C, and under nohup a hang-up: so would the programs that the tests start.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGQUIT", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has only the first
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
