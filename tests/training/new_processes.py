"""train_llm.main in processes of its own that may die; this file is the program that forks them."""

import itertools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # also where this file is the program
import train_llm
from train_llm import SummedLoss

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def main_with_hooks(
    argv, output_dir, journal=os.devnull, die_at=0, signals=(), group=False, ignored=(), fail_at=0, file_limit=None,
    closed_stdout=False, environment=(), constants=(),
):  # fmt: skip
    """train_llm.main in a process of its own: it writes down each change that it is about to make to the output
    directory, kills itself right before the die_at-th, sends itself signals, (micro-step of training, or -micro-step
    of evaluation, signal), as a member of a group the whole group too, ignores some from the start, raises in a
    micro-step of training, and can write no file beyond the limit. constants: of train_llm."""
    os.environ.update(environment)
    for name, value in dict(constants).items():
        setattr(train_llm, name, value)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if group:
        os.setsid()
    if closed_stdout:
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    book, changes, steps = (
        os.open(journal, os.O_WRONLY | os.O_CREAT),
        itertools.count(1),
        itertools.count(1),
    )
    forward, evaluations = SummedLoss.forward, itertools.count(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    def watch(event, details):
        if event in CHANGES and str(details[0]).startswith(output_dir):
            if event == "open" and not (
                isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                return
            if next(changes) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(book, f"{event} {details[0]} {details[1]}\n".encode())

    def counted(self, *args, **kwargs):
        number = next(steps) if self.training else -next(evaluations)
        if number == fail_at:
            raise RuntimeError("no luck")
        for at, by in signals:
            if at == number:
                time.sleep(0.2)  # later than what `timeout` sends twice
                os.kill(os.getpid(), by)
                if group:
                    os.killpg(0, by)
        return forward(self, *args, **kwargs)

    sys.addaudithook(watch)
    Figure.savefig = lambda self, path, **_: Path(path).write_bytes(b"drawn")
    SummedLoss.forward = counted
    try:
        return train_llm.main(argv)
    except KeyboardInterrupt:
        return 130


def serve():
    """Runs each list of requests on stdin, arguments of main_with_hooks, side by side in forks of this process, which
    has everything imported and nothing at work; answers with exit statuses, negative for signals that killed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                os._exit(main_with_hooks(**request))
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
