# SPDX-License-Identifier: Apache-2.0
"""Stages add up their time, and the first Ctrl-C is a request."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from affect.commands.stages import Interruption, Stages


def test_stages_add_up_and_count_what_generators_take() -> None:
    stages = Stages()

    def slow():
        for k in range(3):
            time.sleep(0.02)
            yield k

    for _ in stages.timed(slow(), "decode"):
        with stages("model"):
            time.sleep(0.005)
    assert list(stages.seconds) == ["decode", "model"]
    assert stages.seconds["decode"] > 0.055
    assert stages.seconds["model"] > 0.014
    said = stages.describe(3, "frame")
    assert "frames/s in all; by stage alone: decode" in said
    assert float(said.split("decode ")[1].split(",")[0]) == pytest.approx(3 / stages.seconds["decode"], rel=0.01)


def test_a_stage_that_fails_counts_too() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="x"), stages("model"):
        raise ValueError("x")
    assert "model" in stages.seconds


def test_the_first_interrupt_asks_and_the_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_change_no_signal() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interruption() as stop:
            inside.append((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(False, before)]
