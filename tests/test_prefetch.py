import threading

import pytest

from slm.data.prefetch import prefetch


def test_delivers_steps_in_order_from_the_start():
    with prefetch(lambda step: step * 10, 3) as batches:
        assert [next(batches) for _ in range(5)] == [30, 40, 50, 60, 70]


def test_an_error_arrives_where_its_value_was_due():
    called = []

    def fn(step):
        called.append(step)
        if step == 2:
            raise KeyError("broken step")
        return step

    batches = prefetch(fn, 0)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(KeyError, match="broken step"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert called == [0, 1, 2]


def test_works_ahead_but_not_further_than_depth():
    made, enough = [], threading.Event()

    def fn(step):
        made.append(step)
        if step == 3:
            enough.set()
        return step

    with prefetch(fn, 0, depth=2) as batches:
        next(batches)
        assert enough.wait(10)  # one handed out, two waiting, one in hand
    assert made == [0, 1, 2, 3]


def test_close_stops_the_thread_even_when_nobody_reads():
    batches = prefetch(lambda step: step, 0)
    batches.close()
    batches.close()
    assert not batches._thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)
