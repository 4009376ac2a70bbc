"""Ctrl-C and SIGTERM end a run after the step that is running."""

import signal
import threading


class StopSignal:
    """A context in which the two signals are only noted; `number` is the last one that came."""

    def __enter__(self):
        self.number, self.handlers = None, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        self.number = number

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
