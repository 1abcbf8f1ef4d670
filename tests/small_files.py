"""Run a script where no file may grow beyond so many bytes: a full disk that needs no disk.

python tests/small_files.py 30000 push_to_hub.py runs/demo ...
"""

import os
import resource
import runpy
import signal
import sys

if __name__ == "__main__":
    limit = int(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, not the end of the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
