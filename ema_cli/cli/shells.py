"""What the shells and this program tell each other when a word is completed.

The scripts are for ``eval "$(_EMA_AVG_COMPLETE=bash_source ema-avg)"`` and the like. They differ
from click's own in what words of an average need: a colon or an equals sign does not end a word,
nothing that is offered is expanded by the shell, and no blank follows what is not finished.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)
from click.shell_completion import shell_complete as answer_shell

VARIABLE = "_EMA_AVG_COMPLETE"
_NAME = "ema-avg"

_BASH = """\
%(complete_func)s() {
    local line type
    COMPREPLY=()
    while IFS= read -r line; do
        type=${line%%%%,*}
        case $type in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            open) compopt -o nospace 2>/dev/null; COMPREPLY+=("${line#*,}") ;;
            plain) COMPREPLY+=("${line#*,}") ;;
        esac
    done < <(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" \
%(complete_var)s=bash_complete "${1/#\\~\\//$HOME/}" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null ||
    complete -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a plain open described response
    local type key descr
    response=("${(@f)$(COMP_WORDS="${(j: :)words[1,CURRENT]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete ${(Q)~words[1]} 2>/dev/null)}")
    [[ $PREFIX == --*=* ]] && compset -P 1 '*='
    for type key descr in "${response[@]}"; do
        case $type in
            plain) [[ $descr == _ ]] && plain+=("$key") || described+=("${key//:/\\\\:}:$descr") ;;
            open) open+=("$key") ;;
            dir) _path_files -/ ;;
            file) _path_files ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described
    (( $#plain )) && compadd -V unsorted -a plain
    (( $#open )) && compadd -S '' -V unsorted -a open
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = """\
function %(complete_func)s
    set -l words (commandline -cp | string collect)
    set -l token (commandline -ct | string collect)
    set -l before (string match -r -- '^--[^=]*=' "$token")
    for line in (env %(complete_var)s=fish_complete COMP_WORDS="$words" COMP_CWORD="$token" \
%(prog_name)s 2>/dev/null)
        set -l parts (string split -m 1 , -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories "$parts[2]" | string replace -r '^' -- "$before"
            case file
                __fish_complete_path "$parts[2]" | string replace -r '^' -- "$before"
            case '*'
                echo -- "$before$parts[2]"
        end
    end
end
complete --no-files --command %(prog_name)s --arguments '(%(complete_func)s)'
"""


class _Shell(ShellComplete):
    """The words before the one that is completed, and that one, as they were typed."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return them from the list of words and the ordinal of the last."""
        words = split_arg_string(os.environ.get("COMP_WORDS", ""))
        at = int(os.environ.get("COMP_CWORD") or 0)
        return words[1:at], words[at] if 0 < at < len(words) else ""


class _Bash(_Shell):
    name: ClassVar[str] = "bash"
    source_template: ClassVar[str] = _BASH
    _kept = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return them from the line, whose words bash cuts at colons and equals signs."""
        line = os.environ.get("COMP_LINE")
        if line is None:
            return super().get_completion_args()
        words = split_arg_string(line)
        if not words or (line[-1:].isspace() and not _is_open(line)):
            return words[1:], ""
        word = words.pop()
        if line.endswith(f" {word}"):  # else it is quoted, and no part of it is a word to readline
            breaks = set(os.environ.get("COMP_BREAKS", "")) & set(":=")
            last = max((word.rfind(mark) for mark in breaks), default=-1)
            value = word.partition("=")[2] if word.startswith("--") else word
            self._kept = max(0, last + 1 - (len(word) - len(value)))
        return words[1:], word

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return one line: what it is, and what replaces the last part of the word."""
        kept = self._kept if item.type in ("plain", "open") else 0
        return f"{item.type},{item.value[kept:]}"


def _is_open(line: str) -> bool:
    """Whether a line ends inside quotes."""
    return len(split_arg_string(line)) == len(split_arg_string(f"{line} x"))


class _Zsh(_Shell):
    name: ClassVar[str] = "zsh"
    source_template: ClassVar[str] = _ZSH

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return three lines, none of them empty."""
        text = " ".join((item.help or "_").split())
        return f"{item.type}\n{item.value or '_'}\n{text}"


class _Fish(_Shell):
    name: ClassVar[str] = "fish"
    source_template: ClassVar[str] = _FISH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return them from the line up to the cursor, which ends in the word, if any."""
        words = split_arg_string(os.environ.get("COMP_WORDS", ""))
        token = [*split_arg_string(os.environ.get("COMP_CWORD", "")), ""][0]
        if token and words[1:] and words[-1] == token:
            words.pop()
        return words[1:], token

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return one line, with what it means after a tab."""
        text = " ".join((item.help or "").split())
        return f"{item.type},{item.value}" + (f"\t{text}" if text else "")


def answer(command: click.Command, environment: Mapping[str, str]) -> int:
    """Write the script of a shell, or what may follow on a line; returns the exit code."""
    for shell in (_Bash, _Zsh, _Fish):
        add_completion_class(shell)
    code = 1
    with contextlib.suppress(Exception):  # half a line may be anything; nobody reads what is said
        code = answer_shell(command, {}, _NAME, VARIABLE, environment[VARIABLE])
    return code
