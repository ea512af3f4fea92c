"""The folder of a run on a device: the shell commands that start, poll and examine it, and what
their answers mean."""

from __future__ import annotations

import re
from dataclasses import dataclass

from device_tests.errors import ProtocolError
from device_tests.remote import sensors
from device_tests.remote.shell import DEVICE_ROOT, excerpt, quote
from export.contract.runner_protocol import EVENTS_FILE

RUNS_FOLDER = f"{DEVICE_ROOT}/runs"

MAXIMUM_POLL_BYTES = 2**20
"""New events in the answer to one poll; what is more comes with the next."""

LOG_TAIL_BYTES = 4096


def start_command(folder: str, runner: str) -> str:
    """Starts `runner` detached, once however often it is sent: who makes the folder `started` does.

    The exit code has its block on the disk from the beginning, so that a full disk takes it.
    """
    script = (
        "read -r s </proc/$$/stat; set -- ${s##*) }; t=${20}\n"
        "b=; { read -r b </proc/sys/kernel/random/boot_id; } 2>/dev/null\n"
        'echo 000 >exit.part && echo "$$ $t $b" >pid.part && mv pid.part pid || exit\n'
        f"{runner}\n"
        "echo $? 1<>exit.part && mv exit.part exit\n"
    )
    return (
        f"cd {quote(folder)} || exit\n"
        'b=; { read -r b </proc/sys/kernel/random/boot_id; } 2>/dev/null; echo "boot $b"\n'
        "grep '^oom_kill ' /proc/vmstat 2>/dev/null\n"
        "[ -d started ] && exit 0\n"
        "mkdir started || exit\n"
        f"setsid sh -c {quote(script)} </dev/null >log.txt 2>&1 &\n"
        # adbd hangs up when this shell ends; by then the run must have a session of its own.
        "i=0; until [ -e pid ] || [ $i -ge 50 ]; do sleep 0.02; i=$((i+1)); done\n"
    )


def poll_command(folder: str, marker: str, offset: int, each_poll: str) -> str:
    """Asks for process and sensors, then behind `marker` for the events from byte `offset` on."""
    return (
        f"cd {quote(folder)} || exit\n"
        "b= p= t= r= s= x=\n"
        "{ read -r b </proc/sys/kernel/random/boot_id; read -r p t r <pid\n"
        '[ -n "$p" ] && read -r s </proc/$p/stat; read -r x <exit; } 2>/dev/null\n'
        'echo "boot $b"; echo "pid $p $t $r"; echo "stat $s"; echo "exit $x"\n'
        f"{each_poll}\n"
        "echo sensors\n"
        f"{sensors.POLL_COMMAND}"
        f"echo; echo {quote(marker)}\n"
        f"tail -c +{offset + 1} {EVENTS_FILE} 2>/dev/null | head -c {MAXIMUM_POLL_BYTES}\n"
    )


def kill_command(folder: str) -> str:
    """Kills the run's process group; does nothing if the run has ended."""
    # The group's number stays taken as long as one of its processes lives, so it is ours if its
    # first process is ours or gone.
    return (
        f"cd {quote(folder)} 2>/dev/null || exit 0\n"
        "p= s=\n"
        "[ ! -d started ] || [ -f pid ] || sleep 1\n"  # it has just been begun
        "{ read -r p t b <pid; } 2>/dev/null\n"
        '[ -n "$p" ] && [ "$p" -gt 1 ] || exit 0\n'
        "{ read -r s </proc/$p/stat; } 2>/dev/null\n"
        'if [ -n "$s" ]; then set -- ${s##*) }; [ "${20}" = "$t" ] || exit 0; fi\n'
        "kill -9 -$p 2>/dev/null\n:\n"
    )


def examine_command(folder: str) -> str:
    """Asks for what a failed run left: kills for memory, free room, the end of its log."""
    return (
        "grep '^oom_kill ' /proc/vmstat 2>/dev/null\n"
        f"echo \"free $(stat -f -c '%a %S' {quote(folder)} 2>/dev/null)\"\n"
        "if command -v logcat >/dev/null; then\n"
        'echo "lmkd $(logcat -d -t 500 -s lowmemorykiller:* lmkd:* 2>/dev/null |'
        ' grep -i kill | grep -i -e pocketdiff -e export.host.runner | tail -n 1)"\nfi\n'
        f"echo; echo log; tail -c {LOG_TAIL_BYTES} {quote(folder + '/log.txt')} 2>/dev/null\n:\n"
    )


def parse_tagged(text: str) -> dict[str, str]:
    """Lines `name value`; the first of a name counts, lengths are bounded."""
    said: dict[str, str] = {}
    for line in text[: 2**16].splitlines():
        name, _, value = line.partition(" ")
        said.setdefault(name[:32], value[:1000].strip())
    return said


def parse_integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


@dataclass(frozen=True)
class Poll:
    """The answer to a poll; `events` are whole lines and the beginning of the next."""

    boot_id: str
    pid: int | None
    run_boot_id: str
    is_alive: bool
    exit_code: int | None
    sensors: str
    events: bytes

    @property
    def vanished(self) -> bool:
        """The process is gone and left no exit code; it writes that before it ends."""
        return self.pid is not None and not self.is_alive and self.exit_code is None


def parse_poll(answer: bytes, marker: str) -> Poll:
    """The parts of the answer to a poll. Raises ProtocolError if it has no events section."""
    head, found, events = answer.partition(f"\n{marker}\n".encode())
    if not found:
        raise ProtocolError(
            "the device's answer to a poll broke off "
            f"({excerpt(answer[-200:].decode('utf-8', 'replace')) or 'it was empty'}); try again"
        )
    state, _, sensed = head.decode("utf-8", errors="replace").partition("\nsensors\n")
    said = parse_tagged(state)
    pid, start_ticks, boot_id = [*said.get("pid", "").split(), "", "", ""][:3]
    # comm, in parentheses, may hold anything; state is field 3, starttime field 22: proc(5).
    fields = said.get("stat", "").rpartition(") ")[2].split()
    is_alive = len(fields) > 19 and fields[0] not in ("Z", "X") and fields[19] == start_ticks
    return Poll(
        boot_id=said.get("boot", ""),
        pid=parse_integer(pid),
        run_boot_id=boot_id,
        is_alive=is_alive,
        exit_code=parse_integer(said.get("exit", "")),
        sensors=sensed,
        events=events,
    )
