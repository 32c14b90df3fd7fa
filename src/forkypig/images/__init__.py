"""Base images: a disk, a kernel and an initramfs that a machine boots from.

`store` keeps them, `debian` builds the default one. Both know nothing of machines: whether an image is in use is
hostd's to say.
"""
