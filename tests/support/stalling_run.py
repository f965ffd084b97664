"""A run of the demo model that stops at one sample, to be killed there.

    python stalling_run.py FOLDER LIMIT INDEX

It prints a line when it reaches that sample.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

from eval.runs.loading import ModelOptions
from eval.runs.loop import Share, run
from eval.runs.methods.two_stage import TwoStage
from eval.tasks import Sample, open_task
from eval.tasks.signs import Signs


def stall(at: int) -> None:
    make = Signs.__getitem__

    def stalling(self: Signs, index: int) -> Sample:
        if index == at:
            print("here", flush=True)
            threading.Event().wait()
        return make(self, index)

    Signs.__getitem__ = stalling  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, limit, at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    stall(at)
    task = open_task("signs", limit=limit)
    method = TwoStage(task, ModelOptions(name="demo", batch=2))
    asyncio.run(run(method, task, folder, share=Share(), limit=limit, save_every=1))
