"""A stand-in for the driver: does what its plan says for this start, and remembers how it was started.

    python supervised_program.py RUN_DIR ACTION[,ACTION...] ... first|again [OPTION ...]

One plan per start, the last one for every further start. Actions: `step:N` logs a step as the real one does, `save:N`
makes a checkpoint's folder, `say:TEXT` prints on standard error, `leave` starts a process, stops it, and tells its pid
in the file `left`; `wait` sleeps until a signal, whose name it says; `scale:N` keeps sizes with so many generators;
`exit:N` and `kill` end it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from rlsys.config.models import Sizes
from rlsys.config.sizes import keep_sizes


def main(run_dir: Path, plans: list[str]) -> None:
    starts = run_dir / "starts"
    count = len(starts.read_text().splitlines()) if starts.exists() else 0
    split = next((i for i, plan in enumerate(plans) if plan in ("first", "again")), len(plans))
    with starts.open("a") as file:
        file.write(f"{' '.join(plans[split:])}\n")
    plans = plans[:split]
    for action in plans[min(count, len(plans) - 1)].split(","):
        name, _, value = action.partition(":")
        if name == "step":
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": int(value), "loss": 0.5}) + "\n")
        elif name == "save":
            (run_dir / "checkpoints" / f"step-{int(value):06d}").mkdir(parents=True)
        elif name == "scale":
            keep_sizes(run_dir, Sizes(generators=int(value)))
        elif name == "say":
            print(value, file=sys.stderr, flush=True)
        elif name == "leave":
            left = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            left.send_signal(signal.SIGSTOP)
            (run_dir / "left").write_text(str(left.pid))
        elif name == "wait":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            print("waiting", os.getpid(), flush=True)
            print(signal.Signals(signal.sigwait({signal.SIGINT, signal.SIGTERM})).name, flush=True)
        elif name == "exit":
            sys.exit(int(value))
        elif name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
