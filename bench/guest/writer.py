# Runs in the guest: writes 16 KiB to its disk every ten milliseconds, and leaves it to the kernel when that gets there.
import os
import time

_PLACES, _BYTES = 2000, 16384

fd = os.open("/root/written", os.O_RDWR | os.O_CREAT, 0o600)
place = 0
while True:
    os.pwrite(fd, os.urandom(4096) * (_BYTES // 4096), place * _BYTES)
    place = (place + 1) % _PLACES
    time.sleep(0.01)
