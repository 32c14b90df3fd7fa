# Runs in the guest: rewrites argv[1] MiB of memory for ever, and says on the console when it has been through.
import os
import sys

BLOCK = 1 << 20
console = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
memory = bytearray(int(sys.argv[1]) * BLOCK)
number = 0
while True:
    number = (number + 1) % 256
    block = bytes([number]) * BLOCK
    for start in range(0, len(memory), BLOCK):
        memory[start : start + BLOCK] = block
    os.write(console, b"\x02")
