import threading

import pytest

from actor.turns import SharedSteps


def test_a_thread_that_is_done_does_not_wait_for_one_that_needs_more_steps() -> None:
    steps, permits, taken = SharedSteps(), threading.Semaphore(0), [0]

    def step() -> bool:
        permits.acquire()
        taken[0] += 1
        return taken[0] in (2, 4, 5)

    def need(number: int) -> threading.Thread:
        thread = threading.Thread(target=steps.until, args=(lambda: taken[0] >= number, step), daemon=True)
        thread.start()
        return thread

    needs = {number: need(number) for number in (5, 2, 4)}
    for number in (2, 4, 5):
        permits.release(number - taken[0])
        ended = needs.pop(number)
        ended.join(10)
        assert not ended.is_alive()
        assert taken[0] == number
        assert all(thread.is_alive() for thread in needs.values())


def test_a_step_that_fails_fails_its_own_thread_and_the_next_one_steps() -> None:
    steps, failing = SharedSteps(), threading.Event()
    entered, taken = threading.Event(), [0]

    def fail() -> bool:
        entered.set()
        failing.wait(10)
        raise RuntimeError("out of memory")

    def step() -> bool:
        taken[0] += 1
        return False

    def need_three() -> None:
        entered.wait(10)
        steps.until(lambda: taken[0] == 3, step)

    other = threading.Thread(target=need_three)
    other.start()
    releaser = threading.Timer(0.05, failing.set)
    releaser.start()
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.until(lambda: False, fail)

    other.join(10)
    assert taken[0] == 3
