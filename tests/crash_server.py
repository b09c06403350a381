"""A process that has imported torch once and forks a child for each run that a crash test is about to kill.

Reads one JSON object a line and answers with one:

    {"run": [ARGUMENTS OF minga], "output": FILE}     -> {"pid": N}         a child that ends as a process of its own does
        and "max_file_bytes": N for its RLIMIT_FSIZE
    {"wait": PID}                                     -> {"code": N}        exit code, or minus the signal that ended it
    {"save": RUN, "kill_at": K, ...}                  -> {"killed": BOOL}   a save, killed before its K-th system call
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minga.cli.main import main
from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.shards import open_shards
from minga.data.tokenizer import Tokenizer
from minga.model.transformer import Transformer
from minga.recipes import pretrain
from minga.train.checkpoint import TrainingState, save_checkpoint
from minga.train.optim import Optimizer

PTRACE_TRACEME, PTRACE_SYSCALL, PTRACE_SETOPTIONS, PTRACE_O_TRACESYSGOOD = 0, 24, 0x4200, 1


def ptrace(request: int, pid: int, data: int = 0) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes, call.restype = [ctypes.c_long] * 4, ctypes.c_long
    if call(request, pid, 0, data) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def killed_at_syscall(work: Callable[[], object], kill_at: int) -> bool:
    """Runs `work` in a child and kills it at the entry of its `kill_at`-th system call. False if it ended before that."""
    pid = os.fork()
    if pid == 0:
        ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os.kill(os.getpid(), signal.SIGUSR1)  # the work is done: what follows is not counted
        os._exit(0)
    os.waitpid(pid, 0)
    ptrace(PTRACE_SETOPTIONS, pid, PTRACE_O_TRACESYSGOOD)
    stops = 0
    while True:
        ptrace(PTRACE_SYSCALL, pid)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status), f"the save failed with status {status}"
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:  # at a system call: two stops each, entry and exit
            stops += 1
        done = os.WSTOPSIG(status) == signal.SIGUSR1
        if done or stops == 2 * kill_at - 1:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return not done


@cache
def things_to_save(data: str) -> tuple[Transformer, Optimizer, Tokenizer]:
    shards = open_shards(data)
    config = TrainConfig(steps=1, model=tiny().replace(num_hidden_layers=2, vocab_size=384))
    torch.manual_seed(0)
    model = Transformer(config.model).init_weights()
    optimizer = Optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer, shards.tokenizer


def save(request: dict[str, Any]) -> bool:
    model, optimizer, tokenizer = things_to_save(request["data"])
    state = TrainingState(step=request["step"], tokens=0, seconds=0.0, loader={"mark": request["mark"]})
    run = Path(request["save"])
    return killed_at_syscall(
        lambda: save_checkpoint(run, state, model, optimizer.state_tensors(), tokenizer, keep=request["keep"]),
        request["kill_at"],
    )


def serve() -> int:
    pretrain.SAMPLE_TOKENS = 4  # a life is to be training, not talking
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if "run" in request:
            pid = os.fork()
            if pid == 0:
                output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for number in (1, 2):
                    os.dup2(output, number)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if "max_file_bytes" in request:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
                return main(request["run"])
            answer = {"pid": pid}
        elif "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            answer = {"killed": save(request)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
