from dataclasses import astuple

from vir.data.stages import Laps, Spent


def test_the_time_since_the_last_stage_belongs_to_the_next(monkeypatch):
    clock, cpu = iter([10.0, 11.0, 13.0, 13.5]), iter([1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("time.process_time", lambda: next(cpu))
    laps = Laps()
    laps.end_of("read")
    laps.end_of("decode")
    laps.end_of("read")
    assert laps.done() == Spent(read=1.5, decode=2.0, total=3.5, cpu=2.0)


def test_sums():
    one = Spent(*range(9))
    assert astuple(one + one) == tuple(range(0, 18, 2)) and one + Spent() == one
