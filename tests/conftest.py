"""Signals as in a terminal: a shell that starts the tests in the background lets their processes ignore Ctrl-C."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
