"""For how long what may not begin is given back."""

from bulkhead.service.pauses import Pauses


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_pause_grows_with_the_time_for_which_none_has_begun() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    assert 0.1 <= pauses.next("a") <= 0.2
    clock.now += 4.0
    assert 1.8 <= pauses.next("a") <= 2.2
    assert 0.1 <= pauses.next("b") <= 0.2
    for _ in range(10):
        clock.now += 10.0
        pause = pauses.next("a")
    assert 9.0 <= pause <= 11.0


def test_a_pause_is_short_again_when_one_has_begun_or_nobody_has_asked_for_long() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    for again in (lambda: pauses.begun("a"), lambda: setattr(clock, "now", clock.now + 30.0)):
        pauses.next("a")
        clock.now += 10.0
        assert pauses.next("a") > 4.0
        again()
        assert pauses.next("a") <= 0.2


def test_kinds_of_which_nobody_asks_are_forgotten() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    for kind in range(5000):
        clock.now += 0.1
        pauses.next(str(kind))
    assert len(pauses._stalls) <= 1001
