"""utils/system/signals.py: signals between two steps, never inside one."""

import contextlib
import os
import signal
import threading
import warnings

import pytest

from utils.system.signals import SIGNALS, Stopped, defer_signals, handle_stop_signals


@contextlib.contextmanager
def heard(number):
    """A signal that isn't ignored, also where the tests themselves run under nohup."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_waits_for_the_end_of_what_is_held(number, capfd):
    done = []
    with heard(number), handle_stop_signals(), pytest.raises(Stopped) as stopped:
        with defer_signals():
            with defer_signals():
                os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]
    assert stopped.value.status == 128 + number
    assert "stopping after this step; once more to leave at once" in capfd.readouterr().err


def test_outside_it_comes_at_once():
    with handle_stop_signals(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_an_error_inside_comes_first():
    with handle_stop_signals(), pytest.raises(ZeroDivisionError), defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        1 / 0  # noqa: B018


def test_the_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with handle_stop_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_handled_in_another_thread():
    """A notebook's or a server's, where Python can't."""
    done = []

    def work():
        with handle_stop_signals(), defer_signals():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_a_destructor_swallowed_comes_again():
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
