"""utils/system/signals.py: signals are deferred to the end of a step."""

import contextlib
import os
import signal
import threading
import warnings

import pytest

from utils.system.signals import (
    SAVE_SIGNAL,
    SIGNALS,
    Stopped,
    agree_on_requests,
    agreed_signals,
    defer_signals,
    handle_stop_signals,
    ignore_signals,
    is_agreed_stop,
    own_requests,
    take_save_request,
)


@contextlib.contextmanager
def default_handler(number):
    """Reset a signal that may be ignored because the tests run under nohup."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_at_the_end_of_the_outer_context(number, capfd):
    done = []
    with default_handler(number), handle_stop_signals(), pytest.raises(Stopped) as stopped:
        with defer_signals():
            with defer_signals():
                os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
        done.append("unreachable")
    assert done == ["inner", "outer"]
    assert stopped.value.status == 128 + number
    assert "stopping after this step; a second signal exits at once" in capfd.readouterr().err


def test_outside_the_context_a_signal_is_raised_at_once():
    with handle_stop_signals(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_what_job_queues_send_before_the_end_stops():
    assert {signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU} <= set(SIGNALS)


def test_the_cpu_limit_which_is_signaled_every_second_stops_once():
    with handle_stop_signals(), pytest.raises(Stopped) as stopped, defer_signals():
        os.kill(os.getpid(), signal.SIGXCPU)
        os.kill(os.getpid(), signal.SIGXCPU)
    assert stopped.value.status == 128 + signal.SIGXCPU


def test_a_request_to_save_is_taken_once_and_stops_nothing():
    with handle_stop_signals():
        assert not take_save_request()
        os.kill(os.getpid(), SAVE_SIGNAL)
        with defer_signals():
            pass
        assert take_save_request()
        assert not take_save_request()


def test_workers_are_stopped_by_the_main_process_only():
    before = {number: signal.getsignal(number) for number in (*SIGNALS, SAVE_SIGNAL)}
    try:
        ignore_signals(0)
        left = {number for number in before if signal.getsignal(number) != signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left == {signal.SIGTERM}


def test_ranks_stop_after_the_step_on_which_they_agree():
    steps = []
    with handle_stop_signals(), pytest.raises(Stopped), agreed_signals(several_ranks=True):
        for step in range(9):
            with defer_signals():
                if step == 2:
                    signal.raise_signal(signal.SIGTERM)
                steps.append(own_requests()[0])
                agree_on_requests(stop=step == 4, save=False, late=False)
            if step == 3:
                signal.raise_signal(signal.SIGUSR1)  # between steps
    assert steps == [False, False, True, True, True]


def test_a_rank_stops_without_a_signal_of_its_own():
    with handle_stop_signals(), pytest.raises(Stopped) as stopped, agreed_signals(several_ranks=True), defer_signals():
        agree_on_requests(stop=True, save=False, late=False)
    assert stopped.value.status == 143
    assert is_agreed_stop(stopped.value)


def test_ranks_save_when_one_is_asked_to():
    with handle_stop_signals(), agreed_signals(several_ranks=True):
        agree_on_requests(stop=False, save=True, late=False)  # another rank was
        assert take_save_request()
        assert not take_save_request()
        signal.raise_signal(signal.SIGUSR1)
        assert own_requests() == (False, True, False)
        assert not take_save_request()  # the others don't know yet
        agree_on_requests(stop=False, save=True, late=False)
        assert own_requests() == (False, False, False)
        assert take_save_request()


def test_a_signal_after_the_last_step_is_raised_at_the_end():
    with handle_stop_signals(), pytest.raises(Stopped) as stopped, agreed_signals(several_ranks=True):
        signal.raise_signal(signal.SIGTERM)
    assert not is_agreed_stop(stopped.value)


def test_an_error_in_the_context_takes_precedence():
    with handle_stop_signals(), pytest.raises(ZeroDivisionError), defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        1 / 0  # noqa: B018


def test_the_previous_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with handle_stop_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_install_no_handlers():
    done = []

    def work():
        with handle_stop_signals(), defer_signals():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_swallowed_by_a_destructor_is_raised_later():
    class Swallower:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(100))

    with handle_stop_signals(), pytest.raises(Stopped), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swallower = Swallower()
        del swallower
        with defer_signals():
            pass
