"""A cable between two hosts that is slow and loses frames, in user space: a tap on each, and this process between them.

slow_cable.py LINK PID: run on one host; LINK comes up there, and in the network of process PID. It prints "ready" when
both are there, and for each line read from then on one of JSON: the frames carried and lost so far. Ends with its
input.

Each frame comes out DELAY_S later on the other side, in order. Of every direction's frames one in a hundred is lost, by
a seed: which ones depends on their number alone. (The kernel's own way, netem, is a module that many kernels lack.)
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field

DELAY_S = 0.020
LOSS = 0.01
FRAME_BYTES = 65_536
# Of <linux/if_tun.h>.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


@dataclass
class Direction:
    """From the tap `source` to the tap `sink`."""

    source: int
    sink: int
    lot: random.Random
    under_way: collections.deque[tuple[float, bytes]] = field(default_factory=collections.deque)
    num_lost: int = 0
    num_carried: int = 0

    def take(self) -> None:
        """A frame from the source, on its way or lost."""
        frame = os.read(self.source, FRAME_BYTES)
        if self.lot.random() < LOSS:
            self.num_lost += 1
        else:
            self.under_way.append((time.monotonic() + DELAY_S, frame))

    def deliver(self) -> None:
        """What has been under way for long enough."""
        while self.under_way and self.under_way[0][0] <= time.monotonic():
            frame = self.under_way.popleft()[1]
            with contextlib.suppress(OSError):  # nobody is up there yet
                os.write(self.sink, frame)
                self.num_carried += 1


def tap(name: str) -> int:
    """A new network device in this process's network; its other side, frame by frame."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main(link: str, pid: str) -> None:
    here, there = tap(link), tap("cpi-there")
    subprocess.run(["ip", "link", "set", "cpi-there", "netns", pid, "name", link], check=True)
    ways = [Direction(here, there, random.Random(0)), Direction(there, here, random.Random(1))]
    print("ready", flush=True)
    while True:
        due_s = min((way.under_way[0][0] for way in ways if way.under_way), default=None)
        wait_s = None if due_s is None else max(0.0, due_s - time.monotonic())
        readable, _, _ = select.select([here, there, sys.stdin], [], [], wait_s)
        for way in ways:
            if way.source in readable:
                way.take()
            way.deliver()
        if sys.stdin in readable:
            if not sys.stdin.readline():
                return
            told = {"carried": [way.num_carried for way in ways], "lost": [way.num_lost for way in ways]}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
