"""Prompts from files and standard input."""

import subprocess
import sys

import pytest
from helpers import ROOT

from outside_in.data.tokenizer import gpt2
from outside_in.inference.prompt import notice_end, read_lines, read_prompt


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"Every effort", "Every effort"),
        (b"Every effort\n", "Every effort"),
        (b"Every effort\r\n", "Every effort"),
        (b"One\n\nTwo \n\n", "One\n\nTwo \n"),
        (b"\xef\xbb\xbfna\xc3\xafve", "naïve"),
        (b"", ""),
    ],
)
def test_a_prompt_is_what_the_file_holds_without_its_last_line_end(tmp_path, content, prompt):
    (tmp_path / "prompt.txt").write_bytes(content)
    assert read_prompt(str(tmp_path / "prompt.txt")) == prompt


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("Hello".encode("utf-16"), "got UTF-16; convert it: iconv"),
        ("Hello, you.".encode("utf-16-le"), "got UTF-16LE; convert it: iconv"),
        (b"na\xefve", "byte 2 is 0xef; convert it with iconv"),
        (b"a\0b and c", "byte 1 is NUL"),
        (None, "expected a file with a prompt, cannot read it"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_prompt(str(tmp_path / "prompt.txt"))
    assert complaint in str(caught.value) and str(caught.value).startswith(str(tmp_path / "prompt.txt"))


def test_lines_are_prompts_and_empty_ones_are_none(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("One\r\n\nnaïve \n two\n".encode())
    assert read_lines(str(path)) == ["One", "naïve ", " two"]
    path.write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="expected a prompt on each line, found none"):
        read_lines(str(path))


def test_a_prompt_comes_from_standard_input():
    program = "from outside_in.inference.prompt import read_prompt; print(repr(read_prompt('-')))"
    finished = subprocess.run([sys.executable, "-c", program], input=b"naive\n", capture_output=True, cwd=ROOT)
    assert finished.stdout == b"'naive'\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt", "x", "--prompt-file", "y"),
        ("--prompt-file", "nowhere"),
        ("--prompt-lines", "nowhere"),
        ("--interactive", "--prompt", "x"),
        ("--interactive", "--samples", "2"),
    ],
    ids=str,
)
def test_prompt_options_without_sense_are_one_line_and_exit_code_2(options, tmp_path):
    command = [sys.executable, ROOT / "test_generation.py", tmp_path, *options]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1


@pytest.mark.parametrize(("special", "told"), [(None, True), (True, False), (False, False)])
def test_special_text_in_a_prompt_is_noticed(special, told, capsys):
    notice_end(gpt2(), "one<|endoftext|>two<|endoftext|>", special)
    assert ("is in the text 2 times" in capsys.readouterr().err) == told
    notice_end(gpt2(), "one", None)
    assert not capsys.readouterr().err
