"""Both command lines in a process that has imported everything once: each call runs the script's own entry in a child.

A call costs milliseconds in place of the seconds that importing torch takes, and has a real exit code, real streams and
a process of its own. As a script this is the warm process: it reads calls, one JSON object a line, and answers each.
"""

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("user_grouping_evaluation_sim", "point_in_space_sim", "crowd_fine_tuning_sim")
SCRIPTS = {name: ROOT / name / "run.py" for name in EXPERIMENTS}
SECONDS = 300  # after which a call is killed


class WarmCommandLine:
    """The warm process, seen from a test."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(
        self,
        experiment,
        arguments,
        folder,
        environment=(),
        *,
        send=None,
        parts=(0, ""),
        largest_file=None,
        figures=False,
    ):
        """(exit code, output, errors) of the experiment's script, started in the folder.

        figures: draw them, which takes longer than all else of a small run.
        send: a signal that it and its workers get as soon as so many `parts` are finished below a folder.
        largest_file: no file that it writes can grow beyond so many bytes.
        """
        arguments = [*([] if figures else ["--no-figures"]), *map(str, arguments)]
        request = {"experiment": experiment, "arguments": arguments}
        request |= {"folder": str(folder), "environment": {key: str(value) for key, value in dict(environment).items()}}
        request |= {"send": send, "parts": (parts[0], str(parts[1])), "largest_file": largest_file}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve():
    import torch

    torch.set_num_threads(1)
    import transformers

    from experiment.command_line import run_script

    modules = [f"{experiment}.{module}" for experiment, module in product(EXPERIMENTS, ("main", "run"))]
    for module in (*modules, "joblib.externals.loky", "matplotlib.figure", "tyro"):
        importlib.import_module(module)

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "BertModel", "RobertaForSequenceClassification"):
        getattr(transformers, name)  # modules that are loaded when they are asked for
    gc.freeze()  # what is here is not copied to a child by its collections
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                script = partial(run_script, *entry_of(request["experiment"]))
                os._exit(perform(request, script))
            os.setpgid(child, child)
            status = end_of(child, request)
            out.seek(0), errors.seek(0)
            answer = [os.waitstatus_to_exitcode(status), out.read().decode(), errors.read().decode()]
        print(json.dumps(answer), flush=True)


def entry_of(experiment):
    """What the experiment's run.py gives to run_script."""
    door = importlib.import_module(f"{experiment}.run")
    return f"{experiment}.main", door.Settings, door.PRESETS, door.__doc__


def end_of(child, request):
    """The child's wait status; sends the signal that the request asks for."""
    while request["send"] is not None:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return status
        count, output = request["parts"]
        if count_parts(output) >= count:
            os.killpg(child, request["send"])
            break
        time.sleep(0.002)
    return os.waitpid(child, 0)[1]


def count_parts(output):
    """How many parts are finished. os.walk, for folders that go away meanwhile."""
    names = [name for place, _, names in os.walk(output) if ".parts" in Path(place).parts for name in names]
    return sum(name.endswith(".npz") and not name.startswith(".") for name in names)


def perform(request, script):
    signal.alarm(SECONDS)
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = [str(SCRIPTS[request["experiment"]]), *request["arguments"]]
    try:
        code = script()
    except SystemExit as end:
        code = end.code
    except BaseException:  # what Python itself does with it
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    serve()
