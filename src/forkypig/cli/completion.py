"""forky completion: scripts for shells, written out of the commands themselves.

A script knows every command and option; names come from FORKY_HOME/run/names, which the controller keeps. So a key
press starts no Python: that alone would take longer than one may wait (docs/decisions/0022-seen.md).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, get_args

import typer

from forkypig.cli import printing

app = typer.Typer()

_KINDS = {"MACHINE": "machine", "SNAPSHOT": "snapshot", "IMAGE": "image", "POOL": "pool", "TENANT": "tenant"}
_FILES = {"FILE", "KEYFILE", "PUBKEY", "DIR", "PATH"}


class Shell(Enum):
    """What scripts there are for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@dataclass(frozen=True, slots=True)
class Command:
    """A command, as far as a shell has to know."""

    path: str  # "image ls"
    help: str
    options: tuple[str, ...]
    values: dict[str, str]  # the options that take a value, and the kinds of it; «=x» is the word x itself
    arguments: tuple[str, ...]  # the kinds of each
    repeats: bool  # the last argument may come again


@app.command()
def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
) -> None:
    """Print what a shell needs to complete commands, options and names.

    bash, zsh: source <(forky completion bash), in ~/.bashrc. fish: forky completion fish | source."""
    from forkypig.cli.main import app as whole

    found = list(_commands(typer.main.get_command(whole), ()))
    printing.say(fish(found) if shell is Shell.FISH else bash(found))


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[Command]:
    if within := getattr(command, "commands", None):
        for name, inner in within.items():
            yield from _commands(inner, (*path, name))
        return
    if command.hidden:
        return
    options: list[str] = ["--help"]
    values: dict[str, str] = {}
    arguments: list[str] = []
    repeats = False
    for parameter in command.params:
        kinds = _choices(parameter) or _kinds(parameter.metavar or "")
        if parameter.param_type_name == "argument":
            arguments.append(kinds)
            repeats = parameter.nargs == -1
            continue
        names = [*parameter.opts, *parameter.secondary_opts]
        options += names
        if not parameter.is_flag:
            values |= dict.fromkeys(names, kinds)
    summary = (command.help or "").strip().splitlines()[0] if command.help else ""
    yield Command(" ".join(path), summary, tuple(options), values, tuple(arguments), repeats)


def _choices(parameter: Any) -> str:
    """The words that an option or argument is one of, where it is an enumeration."""
    annotation = parameter.type_descriptor.annotation if hasattr(parameter, "type_descriptor") else None
    found = (each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, Enum))
    return " ".join(f"={member.value}" for each in found for member in each)


def _kinds(metavar: str) -> str:
    """What may stand there: kinds of names, "file", both, or nothing that is known."""
    from forkypig.daemon.settings import Settings

    bare = metavar.strip("[].")
    if bare == "SETTING":
        return " ".join(f"={name}" for name in Settings.model_fields if name != "home")
    if bare in ("SRC", "DST"):
        return "machine: file"
    if metavar == "NAME...":
        return "machine snapshot"
    words = re.split(r"_OR_|\W+", bare)
    found = [_KINDS[word] for word in words if word in _KINDS]
    return " ".join([*found, "file"] if _FILES.intersection(words) else found)


_HOME = "${FORKY_HOME:-$( ((EUID == 0)) && echo /var/lib/forky || echo ${XDG_DATA_HOME:-$HOME/.local/share}/forky)}"

_BASH = """\
# Completion of `forky` for bash, and for zsh by its bashcompinit.
[[ -z ${ZSH_VERSION-} ]] || { autoload -U +X compinit bashcompinit && compinit -u && bashcompinit; }

_forky_names() {  # the kinds of names that are wanted, and what they begin with
  local kind name
  for kind in $1; do
    [[ $kind != =* || ${kind#=} != "$2"* ]] || COMPREPLY+=("${kind#=}")
  done
  [[ -r $3/run/names ]] || return 0
  while read -r kind name; do
    [[ $name == "$2"* ]] || continue
    if [[ " $1 " == *" $kind "* ]]; then COMPREPLY+=("$name"); fi
    if [[ " $1 " == *" $kind: "* ]]; then COMPREPLY+=("$name:"); fi
  done < "$3/run/names"
}

_forky() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local command= words= options= values= kinds= last= word= index= group= prefix= taken=0 arguments=0
  COMPREPLY=()
  # Of --option=value bash makes three words.
  [[ $before != = ]] || before=${COMP_WORDS[COMP_CWORD-2]}
  [[ $current != = ]] || current=
  for ((index = 1; index < COMP_CWORD; index++)); do
    word=${COMP_WORDS[index]}
    [[ $word != -- ]] || return 0
    if ((taken)); then [[ $word == = ]] || taken=0
    elif [[ $word == -* ]]; then
      case " $values " in *" $word="*) taken=1 ;; esac
    elif [[ -z $command || -n $group ]]; then
      command="${command:+$command }$word" group=
      case $command in
@CASES@
        *) return 0 ;;
      esac
    else ((++arguments))
    fi
  done
  if [[ $current == --*=* && " $values " == *" ${current%%=*}="* ]]; then  # and zsh one
    before=${current%%=*} prefix=${current%%=*}= current=${current#*=} taken=1
  fi
  if ((taken)); then
    kinds=" $values " kinds=${kinds#* "$before="} kinds=${kinds%% *} kinds=${kinds//,/ }
  elif [[ -z $command ]]; then words="@TOP@ --help --version"
  elif [[ -n $group ]]; then words="$group --help"
  elif [[ $current == -* ]]; then words=$options
  else
    for word in $kinds; do
      if ((arguments == 0)); then break; fi
      if [[ $word == ... ]]; then word=$last; break; fi
      last=$word word=; ((arguments--))
    done
    kinds=${word//,/ }
    [[ $kinds != ... ]] || kinds=${last//,/ }
  fi
  [[ -z $words ]] || COMPREPLY=($(compgen -W "$words" -- "$current"))
  _forky_names "$kinds" "$current" "@HOME@"
  if [[ " $kinds " == *" file "* ]]; then
    compopt -o filenames 2> /dev/null
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
  fi
  [[ -z $prefix ]] || COMPREPLY=("${COMPREPLY[@]/#/$prefix}")
  [[ ${#COMPREPLY[@]} != 1 || ${COMPREPLY[0]} != *: ]] || compopt -o nospace 2> /dev/null
}
complete -F _forky forky
"""


def bash(commands: list[Command]) -> str:
    """A script that defines everything and writes nothing."""
    cases = []
    for command in commands:
        values = " ".join(f"{option}={kinds.replace(' ', ',')}" for option, kinds in command.values.items())
        kinds = " ".join([each.replace(" ", ",") or "-" for each in command.arguments] + ["..."] * command.repeats)
        cases.append(
            f"        {shlex.quote(command.path)}) options={shlex.quote(' '.join(command.options))} "
            f"values={shlex.quote(values)} kinds={shlex.quote(kinds)} ;;"
        )
    groups = _groups(commands)
    top = groups.pop("")
    cases += [f"        {shlex.quote(name)}) group={shlex.quote(' '.join(names))} ;;" for name, names in groups.items()]
    return _BASH.replace("@CASES@", "\n".join(cases)).replace("@TOP@", " ".join(top)).replace("@HOME@", _HOME)


def _groups(commands: list[Command]) -> dict[str, dict[str, str]]:
    """What comes next after "", "auth", "auth token", …: names, and what people are told of those that are commands."""
    groups: dict[str, dict[str, str]] = {}
    for command in commands:
        words = command.path.split()
        for depth, word in enumerate(words):
            is_command = depth == len(words) - 1
            groups.setdefault(" ".join(words[:depth]), {})[word] = command.help if is_command else ""
    return groups


_FISH = """\
# Completion of `forky` for fish.
function __forky_names
    set -l home /var/lib/forky
    test (id -u) = 0; or set home (set -q XDG_DATA_HOME; and echo $XDG_DATA_HOME; or echo $HOME/.local/share)/forky
    set -q FORKY_HOME; and set home $FORKY_HOME
    test -r $home/run/names; or return 0
    while read -l kind name
        contains -- $kind $argv; and echo $name
        contains -- $kind: $argv; and echo $name:
    end < $home/run/names
end
function __forky_at
    set -l words (commandline -opc)
    contains -- -- $words; and return 1
    set -l bare
    for word in $words[2..-1]
        string match -q -- '-*' $word; or set -a bare $word
    end
    set -l count (count $argv)
    test (count $bare) -ge $count; and test "$bare[1..$count]" = "$argv"
end
function __forky_exactly
    set -l words (commandline -opc)
    set -l bare
    for word in $words[2..-1]
        string match -q -- '-*' $word; or set -a bare $word
    end
    test "$bare" = "$argv"
end
complete -c forky -f
"""


def fish(commands: list[Command]) -> str:
    """The same for fish: of arguments it is not told which comes where, so all kinds of a command are offered."""
    lines = [_FISH]
    for group, names in _groups(commands).items():
        for name, summary in names.items():
            lines.append(f"complete -c forky -n '__forky_exactly {group}' -a {name} -d {_fish(summary)}")
    for command in commands:
        at = f"complete -c forky -n '__forky_at {command.path}'"
        for option in command.options:
            name = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            value = f" {_value(command.values[option])}" if option in command.values else ""
            lines.append(f"{at} {name}{value}")
        kinds = " ".join(dict.fromkeys(" ".join(command.arguments).split()))
        if kinds:
            lines.append(f"{at}{' -F' * ('file' in kinds)} -a {_fish(_source(kinds))}")
    return "\n".join(lines) + "\n"


def _value(kinds: str) -> str:
    """Of an option that takes one: files are offered only where it is one."""
    return f"{'-r' if 'file' in kinds.split() else '-x'} -a {_fish(_source(kinds))}"


def _source(kinds: str) -> str:
    words = [kind[1:] for kind in kinds.split() if kind.startswith("=")]
    names = " ".join(kind for kind in kinds.split() if not kind.startswith("="))
    return " ".join([*words, f"(__forky_names {names})"] if names else words)


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
