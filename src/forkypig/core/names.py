"""What machines are called when nobody says: pleasant names, and the numbered names of children."""

from collections.abc import Callable, Collection
from itertools import count as numbers

from forkypig.errors import InvalidRequest
from forkypig.model import check_name

_LONGEST_NAME = 63

_ADJECTIVES = (
    "amber bold brave bright brisk calm clever cosy curly daring eager early fair fleet fond gentle glad golden happy "
    "hardy honest jolly keen kind lively lucky mellow merry mild modest neat nimble noble patient plucky proud quick "
    "quiet rosy rustic shy silver sleek smart snug sober solid spry sturdy sunny swift tidy upbeat warm wise witty"
)
_ANIMALS = (
    "badger bear beaver bison boar camel crane crow deer dove duck eagle elk falcon ferret finch fox gecko goat goose "
    "hare hawk hedgehog heron horse ibex jackal kestrel kiwi lark lemur lion llama lynx magpie marten mole moose mouse "
    "newt otter owl ox panda piglet plover pony puffin quail rabbit raven robin seal sheep shrew sparrow squirrel "
    "stoat stork swan tapir thrush tiger toad trout turtle vole walrus weasel whale wolf wombat wren yak zebra"
)


def pleasant_name(taken: Collection[str], choose: Callable[[int], int]) -> str:
    """A name like "merry-otter" that is not in `taken`. `choose(n)` gives a number from 0 to n - 1."""
    adjectives, animals = _ADJECTIVES.split(), _ANIMALS.split()
    name = f"{adjectives[choose(len(adjectives))]}-{animals[choose(len(animals))]}"
    if name not in taken:
        return name
    return next(numbered for n in numbers(2) if (numbered := f"{name}-{n}") not in taken)


def child_names(prefix: str, count: int, taken: Collection[str]) -> list[str]:
    """The first `count` of PREFIX-1, PREFIX-2, … that are not in `taken`.

    Raises InvalidRequest where the prefix is no name, or so long that the names made of it are none.
    """
    check_name("machine", prefix)
    names: list[str] = []
    for n in numbers(1):
        if len(names) == count:
            break
        if (name := f"{prefix}-{n}") not in taken:
            names.append(name)
    if names and len(names[-1]) > _LONGEST_NAME:
        raise InvalidRequest(
            f"children named «{names[-1]}» would have more than {_LONGEST_NAME} characters: choose a shorter prefix"
        )
    return names


def free_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, or where that is taken WANTED-2, WANTED-3, …: for machines that are found, not made."""
    if wanted not in taken:
        return wanted
    stem = wanted[: _LONGEST_NAME - 7].rstrip("-")
    return next(name for n in numbers(2) if (name := f"{stem}-{n}") not in taken)
