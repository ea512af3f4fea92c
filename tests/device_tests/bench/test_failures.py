"""What a run leaves on the device is understood, and every end has a name. No device."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.bench.failures import Traces, name_failure, parse_traces
from device_tests.bench.run_folder import parse_poll
from device_tests.errors import DeviceGone, ProtocolError
from device_tests.remote.retry import retry_while_gone
from device_tests.results.records import REASONS


def test_a_poll_is_understood() -> None:
    stat = "12 (a) b) S " + " ".join(str(n) for n in range(4, 53))
    answer = f"boot B\npid 12 22 B\nstat {stat}\nexit \nsensors\nzone 0 40000 cpu\n\nM\n{{}}\n"
    poll = parse_poll(answer.encode(), "M")
    assert (poll.boot_id, poll.pid, poll.run_boot_id, poll.exit_code) == ("B", 12, "B", None)
    assert poll.is_alive and not poll.vanished
    assert poll.events == b"{}\n" and "zone 0" in poll.sensors
    for change in (("pid 12 22", "pid 12 23"), (") S ", ") Z "), (f"stat {stat}", "stat ")):
        gone = parse_poll(answer.replace(*change).encode(), "M")
        assert gone.vanished
    ended = parse_poll(answer.replace("exit ", "exit 137").encode(), "M")
    assert ended.exit_code == 137 and not ended.vanished


@given(st.binary() | st.text().map(str.encode))
def test_no_poll_breaks_the_parser(answer: bytes) -> None:
    for whole in (answer, answer + b"\nM\n" + answer):
        with suppress(ProtocolError):
            parse_poll(whole, "M")
    parse_traces(answer.decode("utf-8", "replace"), 1)


COUNT = st.none() | st.integers(0, 300)


@given(COUNT, st.builds(Traces, st.text(max_size=50), COUNT, st.text(max_size=50), COUNT))
def test_every_end_has_a_name(exit_code: int | None, traces: Traces) -> None:
    failure = name_failure(exit_code, None, traces)
    assert failure.reason in REASONS and failure.sentence
    json.dumps(dict(failure.evidence))


def test_the_killer_is_told_from_the_evidence() -> None:
    assert name_failure(137, None, Traces(oom_kills=1)).reason == "out_of_memory"
    assert name_failure(None, None, Traces(oom_kills=1)).reason == "out_of_memory"
    assert name_failure(137, None, Traces(oom_kills=0)).reason == "crash_signal"
    assert name_failure(137, None, Traces(oom_kills=None)).reason == "crash_signal"
    assert name_failure(139, None, Traces(oom_kills=1)).reason == "crash_signal"
    by_lmkd = name_failure(137, None, Traces(lmkd="lmkd: Kill 'pocketdiff' (12)"))
    assert by_lmkd.reason == "out_of_memory" and "low-memory killer" in by_lmkd.sentence
    told = {"failure": {"reason": "cancelled", "sentence": "It was cancelled."}}
    assert name_failure(3, told, Traces()).reason == "internal"


def test_a_device_that_answers_nonsense_is_given_up() -> None:
    class Nonsense:
        serial = "nonsense"
        found = 0

        def reconnect(self, timeout_s: float) -> None:
            self.found += 1

    def call() -> None:
        raise ProtocolError("nonsense")

    device = Nonsense()
    with pytest.raises(ProtocolError):
        retry_while_gone(device, call, 0.2)  # type: ignore[arg-type]
    assert device.found >= 2
    with pytest.raises(DeviceGone):

        def gone() -> None:
            raise DeviceGone("gone")

        retry_while_gone(device, gone, 0.0)  # type: ignore[arg-type]
