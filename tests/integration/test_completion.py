"""Completion in zsh and fish themselves; bash is asked in unit/test_cli.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(shell: str) -> bytes:
    """What ``gpujobs completion`` prints for a shell."""
    argv = [sys.executable, "-m", "gpujobs", "completion", shell]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=60, check=True).stdout


ZSH = """
zmodload zsh/zpty
zpty z "zsh -f -i"
zpty -w z "PS1=; fpath=($1 \\$fpath); autoload -U compinit; compinit -u -D; echo re''ady"
zpty -r -m z line '*ready*'
zpty -wn z $'gpujobs completi\\t'
zpty -r -m z line '*gpujobs completi*on*'
"""


def test_zsh_completes_at_the_first_tab_from_a_directory_of_functions(tmp_path: Path) -> None:
    (tmp_path / "_gpujobs").write_bytes(script("zsh"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path)], env=dict(os.environ) | {"PATH": path},
                          capture_output=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done


def test_fish_completes_commands_and_leaves_files_to_itself(tmp_path: Path) -> None:
    (tmp_path / "c.fish").write_bytes(script("fish"))
    ask = f'source {tmp_path}/c.fish; complete -C "gpujobs completi"; complete -C "gpujobs check README"'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["fish", "-N", "-c", ask], env=dict(os.environ) | {"PATH": path, "HOME": str(tmp_path)},
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["completion", "README.md"], done
