"""Ctrl-C while a command imports its modules. The module itself imports next to nothing."""
import os
import signal


class quits_at_once:
    """In this block Ctrl-C ends the process with one line and status 130.

    A KeyboardInterrupt during an import prints a traceback, or is lost in an extension module.
    """

    def __init__(self, command):
        self.line = f"\n{command}: interrupted\n"
        self.is_on = False

    def __enter__(self):
        # A background job ignores SIGINT and goes on doing so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self.quit)
                self.is_on = True
            except ValueError:                      # only the main thread may change this
                pass

    def __exit__(self, *_):
        if self.is_on:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def quit(self, *_):
        os.write(2, self.line.encode())
        os._exit(130)
