"""Started by torchrun in test_distributed.py: one rank of a script of ours, which tells its end.

    torchrun --nproc_per_node=2 tests/rank.py <script> <folder for the ranks' states> <arguments>

With GFBS_TEST_DIES=<rank> in the environment, that rank dies after its first epoch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.cli.parser import run_script
from utils.run.folder import RunCallback

script, folder, *argv = sys.argv[1:]
rank = os.environ["RANK"]
call = RunCallback.after_epoch


def tell(self, epoch, state):
    if os.environ.get("GFBS_TEST_DIES") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    call(self, epoch, state)
    end = {"weights": self.state.model.state_dict(), "accuracy": epoch.test.accuracy}
    torch.save(end, Path(folder) / f"rank{rank}.pt")


RunCallback.after_epoch = tell
module = importlib.import_module(script)
sys.argv = [f"{script}.py", *argv]
sys.exit(run_script(module.parse_args, module.main))
