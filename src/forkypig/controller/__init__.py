"""The controller: the API that users talk to. Holds intent and metadata; never touches QEMU, asks hostd."""
