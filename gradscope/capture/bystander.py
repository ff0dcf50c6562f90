"""What the processes have for a recorder that train along and write nothing."""

from collections.abc import Callable

from gradscope.capture.recorder import Packet, Recorder
from gradscope.log.writer import RunWriter


class Bystander(Recorder):
    """A recorder without thread and file: whatever it is given is dropped."""

    def __init__(self) -> None:
        """Begin nothing."""
        self.seconds = 0.0
        self.record_bytes = 0

    def submit(self, packet: Packet) -> None:
        """Drop it."""

    def offer(self, packet: Packet) -> None:
        """Drop it."""

    def call(self, write: Callable[[RunWriter], None]) -> None:
        """Drop it."""

    def flush(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """There is nothing."""

    def abandon(self) -> None:
        """There is nothing."""

    def can_write(self) -> bool:
        """Nothing is written."""
        return False
