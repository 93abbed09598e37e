"""The least that a simulated phone's process does: listens, announces itself, waits for SIGTERM.

Its `--name` tells it how to misbehave: `stillborn` ends at once, `mute` never listens, `stubborn` ignores
SIGTERM, `noisy` prints two megabytes, `slow` takes a while before it listens.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("data-dir", "host", "id", "name", "width", "height", "dpi", "android-version"):
        parser.add_argument(f"--{option}")
    for port in ("adb-port", "webrtc-port", "scrcpy-port"):
        parser.add_argument(f"--{port}", type=int)
    options = parser.parse_args()
    if options.name == "stillborn":
        sys.exit("no breath")
    if options.name == "noisy":
        sys.stdout.write("x" * (2 << 20))
    if options.name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.name == "slow":
        time.sleep(0.5)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.name != "mute":
        listener.bind((options.host, options.adb_port))
        listener.listen()
        announcement = Path(options.data_dir) / "phone.json"
        announcement.write_text(json.dumps({"pid": os.getpid()}))
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
