"""The SHA-256 of a file on the device, taken there while the file is still being written.

Who writes it, and what follows from the hash, is not known here. A hash that could not be taken to
its end, for whatever reason, is none or a wrong one: only the right one says something.

A process of its own on the device reads the file chunk by chunk: one when the next has begun, since
a writer in order has then finished it, and the last when `finish_command` says so.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from device_tests.errors import ProtocolError
from device_tests.remote.files import Run, transfer_timeout_s
from device_tests.remote.shell import excerpt, quote

_BLOCK_BYTES = 2**20

# Standard input is the followed file, held open: what takes its name meanwhile is not read.
# Offsets are counted in blocks, since numbers in Android's mksh have 32 bits. Whoever removes
# "$s" ends this; so do five minutes without a new chunk, for a host that died.
_SCRIPT = """\
s=$1 block=$2 per_chunk=$3 chunks=$4 program=$5
: >"$s" || exit
begun() {
  [ "$(dd bs=$block skip=$(($1 * per_chunk)) count=1 </proc/self/fd/0 2>/dev/null | wc -c)" -gt 0 ]
}
all() {
  i=0 w=0
  while [ $i -lt $chunks ]; do
    until [ -e "$s.end" ] || begun $((i + 1)); do
      w=$((w + 1))
      [ -e "$s" ] && [ $w -lt 3000 ] || return
      sleep 0.1 || sleep 1
    done
    dd bs=$block count=$per_chunk 2>/dev/null || return
    i=$((i + 1)) w=0
  done
}
h=$(all | $program)
[ -e "$s" ] && echo "$h" >"$s"
"""


@dataclass(frozen=True)
class BackgroundHash:
    """A process on the device that hashes the file at `path` behind its writer.

    inode: of the file that it reads. sum_path: a file beside it that holds the hash at the end.
    """

    path: str
    inode: str
    process: str
    sum_path: str

    @classmethod
    def start(
        cls, run: Run, path: str, stem: str, size_bytes: int, chunk_bytes: int, program: str
    ) -> BackgroundHash:
        """Begin to follow `path`, which is made if it is not there.

        stem: path without a suffix, for what is written beside. size_bytes: of the whole file,
        which is written in order from whatever it has already, in chunks of `chunk_bytes`; bytes
        that are there stay as they are. program: what `remote_files.hash_program` found.
        """
        sum_path = f"{stem}.{secrets.token_hex(4)}.sum"
        block = math.gcd(chunk_bytes, _BLOCK_BYTES)
        numbers = (block, chunk_bytes // block, math.ceil(size_bytes / chunk_bytes))
        arguments = quote(_SCRIPT, "sh", sum_path, *map(str, numbers), program)
        command = (
            f"p={quote(path)} s={quote(sum_path)}\n"
            ': >>"$p" && i=$(stat -c %i "$p") || exit\n'
            f'setsid sh -c {arguments} <"$p" >/dev/null 2>&1 &\n'
            # adbd hangs up when this shell ends; by then it must have a session of its own.
            'w=0; until [ -e "$s" ] || [ $w -ge 50 ]; do sleep 0.02; w=$((w + 1)); done\n'
            'echo "$i $!"'
        )
        said = run(command, 60.0).text
        words = said.split()
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise ProtocolError(
                f"the device answered {excerpt(said)!r} when it was to hash {path}; look whether "
                "its shell has stat"
            )
        return cls(path, words[0], words[1], sum_path)

    def finish_command(self, size_bytes: int) -> str:
        """Shell text that waits for the hash of a file that is now whole and sets `$h` to it, ""
        if it is not to be had; `$i` is the inode of the file that is meant.

        Also "" while others follow a file of the same stem: they may write what was hashed already.
        """
        s = quote(self.sum_path)
        others = f"{quote(self.sum_path.rsplit('.', 2)[0])}.*.sum"
        return (
            f'h=; set -- {others}; if [ "$i" = {self.inode} ] && [ $# -eq 1 ] && [ -e {s} ]; then '
            f": >{s}.end; w=0; while kill -0 {self.process} && [ ! -s {s} ] && "
            f"[ $w -lt {round(20 * transfer_timeout_s(size_bytes))} ]; do "
            f"sleep 0.05 || sleep 1; w=$((w + 1)); done; read -r h <{s}; fi 2>/dev/null; "
            f"rm -f {s} {s}.end; "
        )
