"""Signals are flags while a run trains; the second one of a kind that ends ends at once."""

import os
import signal
import subprocess
import sys
import time

from models.stages.signals import SAVE, Signals

PATIENT = """
import time
from models.stages.signals import Signals
with Signals().flagged():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_the_strongest_wish_counts() -> None:
    signals = Signals()
    with signals.flagged():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == SAVE
        signals.saved()
        assert signals.asked == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == 130
        os.kill(os.getpid(), signal.SIGTERM)  # at once: a launcher's copy of the same wish
        assert signals.asked == 143
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.saved()
        assert signals.asked == 143


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals().flagged():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", PATIENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143
    process.stdout.close()
