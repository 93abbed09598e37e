"""`python -m phones.simulator`: one simulated phone as a process, or as the first process of a container."""

import os
import signal
import sys


def main() -> int:
    """Run the phone until a signal ends it; the process's exit code."""
    if os.getpid() == 1:
        # The kernel keeps from a first process each signal it has not asked for, and the imports take a
        # while: a container stopped meanwhile would only end when the engine's patience does.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    from phones.simulator import program

    return program.main()


if __name__ == "__main__":
    sys.exit(main())
