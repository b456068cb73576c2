"""The pages keep their word: Python blocks run, commands are parsed, links lead somewhere.

For whoever writes a page (every README.md, and what is in .github):

- Its ``python`` blocks run in order, as one program, in a folder where ``path/or/hub-id`` is a tiny
  pipeline and ``bundle`` a bundle of it. The names ``prompt_embeds`` and ``negative_prompt_embeds``
  are there. Presets take 4 steps, whatever the page says. ``python gpu`` is compiled only.
- Every line of a ``bash`` block is parsed as the program itself would: options exist, presets,
  targets and GPUs are read, scripts and extras are there. So is a command in `inline code`, which
  may leave arguments out. Words in capitals stand for whatever the reader has.
- Links lead to files and headings that exist; source files named in `inline code` exist.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("report.md", "evaluation.md", "quality.md")
ROOMS = ("export", "kernels", "runtime", "tools")
PAGES = [
    path
    for path in (
        *sorted(ROOT.glob("*.md")),
        *(path for name in (".github", *ROOMS) for path in sorted((ROOT / name).rglob("*.md"))),
    )
    if path.name not in GENERATED
]
MOST_LINES = 180
"""Of the first page: five minutes of reading."""


def page(path):
    return pytest.param(path, id=path.relative_to(ROOT).as_posix())


# -- what is on a page -----------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block."""

    kind: str  # what stands behind the fence
    line: int  # of its first line, from 1
    text: str


def blocks(text):
    found, kind, begin = [], None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if kind is None:
            kind, begin = line[3:].strip(), number + 1
        else:
            found.append(Block(kind, begin, "\n".join(lines[begin - 1 : number - 1])))
            kind = None
    assert kind is None, f"the block of line {begin - 1} has no end"
    return found


def prose(text):
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def block_commands(text):
    """The commands of a page's ``bash`` blocks, one a string."""
    joined = [b.text.replace("\\\n", " ") for b in blocks(text) if b.kind == "bash"]
    return [part for block in joined for line in block.splitlines() for part in line.split("&&")]


# -- Python ----------------------------------------------------------------------------------------


QUICK = "presets=presets, measurement=few_images"


def few_steps(code):
    """The same code with presets of 4 steps, measured on little."""
    code = re.sub(r"(num_inference_steps=)\d+", r"\g<1>4", code)
    code = code.replace("CompileOptions(presets=presets)", f"CompileOptions({QUICK})")
    return re.sub(r"\b((?:dpm|ddim|euler)(?:-auto)?[:-])\d+", r"\g<1>4", code)


def few_images():
    """Options with which a preset is measured in seconds."""
    from blockcache.export import (
        AlignmentOptions,
        ConvergedOptions,
        MeasurementOptions,
        ProfileOptions,
        SensitivityOptions,
        TrialOptions,
    )

    return MeasurementOptions(
        profile=ProfileOptions(prompts=2, seeds=1),
        converged=ConvergedOptions(images=2),
        sensitivity=SensitivityOptions(images=1),
        alignment=AlignmentOptions(images=4),
        trials=TrialOptions(candidates=1, images=2, steps=8),
    )


@pytest.fixture(scope="module")
def readers_folder(pipeline_folder, tmp_path_factory):
    """Where a reader stands who has followed the page so far."""
    pytest.importorskip("onnxruntime")
    from blockcache.export import (
        CompileOptions,
        PresetOptions,
        compile_model,
        encode_prompts,
        load_model,
        load_parts,
    )

    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(pipeline_folder("sd"), folder / "path/or/hub-id")
    presets = tuple(PresetOptions.parse(text) for text in ("dpm:4:0.5", "dpm:4:blocks1.2:history"))
    options = CompileOptions(presets=presets, measurement=few_images())
    model = load_model(folder / "path/or/hub-id")
    parts = load_parts(folder / "path/or/hub-id")
    prompts = encode_prompts(folder / "path/or/hub-id")
    compile_model(model, folder / "bundle", options, prompts, parts=parts)
    return folder


PYTHON_PAGES = [path for path in PAGES if any(b.kind == "python" for b in blocks(path.read_text()))]


@pytest.mark.parametrize("path", [page(path) for path in PYTHON_PAGES])
def test_python_runs(path, readers_folder, tmp_path, monkeypatch):
    from blockcache.export import encode_text

    shutil.copytree(readers_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    positive, negative = encode_text("path/or/hub-id", ["a fox", "a house"])
    names = {
        "prompt_embeds": positive["encoder_hidden_states"],
        "negative_prompt_embeds": negative["encoder_hidden_states"],
        "few_images": few_images(),
    }
    for block in blocks(path.read_text()):
        if block.kind == "python":
            code = "\n" * (block.line - 1) + few_steps(block.text)
            exec(compile(code, str(path), "exec"), names)


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_python_compiles(path):
    for block in blocks(path.read_text()):
        if block.kind.split()[:1] == ["python"]:
            compile(block.text, str(path), "exec")


def test_the_first_page_shows_the_way_of_a_model():
    text = "\n".join(b.text for b in blocks((ROOT / "README.md").read_text()) if b.kind == "python")
    for name in ("compile_model", "load_parts", "Pipeline.open", "attach"):
        assert name in text


# -- commands --------------------------------------------------------------------------------------


class WrongError(Exception):
    """What a command says that is not so."""


def is_placeholder(word):
    return bool(re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[a-z]+)?", word))


def check_blockcache(words, *, whole):
    """Parse as the command does; where not ``whole``, arguments may be missing."""
    import typer

    from blockcache.tools.cli import _app

    group = typer.main.get_command(_app())
    name = words[0] if words and not words[0].startswith("-") else None
    command = group if name is None else group.commands.get(name)
    if command is None:
        raise WrongError(f"no command {name}")
    try:
        given = command.make_context(name or "blockcache", list(words[name is not None :])).params
    except typer.Exit:  # --version, --help
        return
    except typer.BadParameter.__base__ as error:  # click's UsageError, wherever typer has it from
        if whole or type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):
            raise WrongError(error.format_message()) from error
        return
    check_values(name, given)


def check_values(command, given):
    """Read the values that have a grammar of their own."""
    from blockcache.export import PresetOptions, Target, gpu
    from blockcache.runtime import ConfigError

    readers = {
        "preset": PresetOptions.parse,
        "recommend": PresetOptions.parse,
        "reference": PresetOptions.parse,
        "target": Target.parse,
        "gpu": gpu,
    }
    for name, read in readers.items():
        values = given.get(name) or ()
        for value in [values] if isinstance(values, str) else values:
            if is_placeholder(value) or (command, value) == ("estimate", "host"):
                continue
            try:
                read(value)
            except ConfigError as error:
                raise WrongError(f"--{name} {value}: {error}") from error


def check_python(words, *, whole):
    """``-m MODULE`` or a script is there and knows the options."""
    module = words[1:2] if words[:1] == ["-m"] else []
    if module == ["pytest"]:
        return check_pytest(words[2:], whole=whole)
    if module:
        check_module(module[0])
        spec = importlib.util.find_spec(module[0])
        files = [Path(spec.origin)]
        if spec.submodule_search_locations:
            files = sorted(Path(spec.origin).parent.glob("*.py"))
        return check_options(words[2:], "\n".join(file.read_text() for file in files))
    if not words:
        raise WrongError("python alone runs nothing")
    check_file(words[0])
    return check_options(words[1:], (ROOT / words[0]).read_text())


def check_module(name):
    if not name.startswith("blockcache.") or importlib.util.find_spec(name) is None:
        raise WrongError(f"no module {name}")


def check_file(name):
    if not (ROOT / name).is_file():
        raise WrongError(f"no file {name}")


def check_options(words, source):
    """Options stand in the source, as such or as the parameter that typer makes one of.

    So do the commands of a script: words in lower case that are no option's value.
    """
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--"):
            parameter = word[2:].removeprefix("no-").replace("-", "_")
            if word not in source and not re.search(rf"\b{parameter}\s*:", source):
                raise WrongError(f"no option {word}")
        elif re.fullmatch(r"[a-z]+", word) and not before.startswith("--"):
            known = re.search(rf"def {word}\(|\"{word}\"", source)
            if not known:
                raise WrongError(f"no command {word}")


def check_bash(words, *, whole):
    """A script of the repository; its words are known to it."""
    check_file(words[0])
    source = (ROOT / words[0]).read_text()
    for word in re.split(r"[\s|\[\]]+", " ".join(words[1:])):
        if not re.search(rf"\b{re.escape(word)}\b", source):
            raise WrongError(f"{words[0]} does not know {word}")


def check_pip(words, *, whole):
    """Extras and build switches exist."""
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        for extra in extras.split(","):
            if not re.search(rf"^{extra} = \[", project, re.MULTILINE):
                raise WrongError(f"no extra {extra}")
    for switch in re.findall(r"cmake\.define\.(\w+)", " ".join(words)):
        if f"set({switch} " not in (ROOT / "CMakeLists.txt").read_text():
            raise WrongError(f"no switch {switch}")


def check_pytest(words, *, whole):
    """Markers are declared, paths exist."""
    project = (ROOT / "pyproject.toml").read_text()
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and f'"{word}: ' not in project:
            raise WrongError(f"no marker {word}")
        if word.startswith("tests") and not (ROOT / word).exists():
            raise WrongError(f"no tests at {word}")


def check_cmake(words, *, whole):
    """CMakeLists.txt is where it is said to be."""
    if "-S" in words:
        check_file(f"{words[words.index('-S') + 1]}/CMakeLists.txt")


CHECKS = {
    "blockcache": check_blockcache,
    "python": check_python,
    ".venv/bin/python": check_python,
    "bash": check_bash,
    "pip": check_pip,
    "pytest": check_pytest,
    "cmake": check_cmake,
}


def wrong_commands(text):
    """What is wrong with the commands of a page, one line each."""
    found = []
    inline = [code for code in inline_code(text) if " " in code]
    for whole, commands in ((True, block_commands(text)), (False, inline)):
        for command in commands:
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # an apostrophe: inline code of another language
                words = []
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)  # IMAGES=160 bash ...
            words = [word for word in words if word != "..."]
            check = CHECKS.get(words[0]) if words else None
            if check is None:
                if whole and words:
                    found.append(f"{command}: {words[0]} is not known to this test")
                continue
            try:
                check(words[1:], whole=whole)
            except WrongError as wrong:
                found.append(f"{command}: {wrong}")
    return found


def wrong_presets(text):
    """Presets in inline code that cannot be read."""
    from blockcache.export import PresetOptions
    from blockcache.runtime import ConfigError
    from blockcache.runtime.solvers.solver import SOLVERS

    found = []
    for code in inline_code(text):
        if re.match(r"(dpm|ddim|euler|unipc|lcm)[:-]", code) and code not in SOLVERS:
            try:
                PresetOptions.parse(code)
            except ConfigError as error:
                found.append(f"{code}: {error}")
    return found


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_commands_are_right(path):
    pytest.importorskip("typer")
    assert wrong_commands(path.read_text()) == []
    assert wrong_presets(path.read_text()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("blockcache compile m o --presets dpm:20", "No such option"),
        ("blockcache compile m o --preset dpm:20:fast", "Expected a policy"),
        ("blockcache compile m", "Missing argument"),
        ("blockcache compile m o --gpu a1000", "Expected a GPU"),
        ("blockcache build b --target a1000", "Expected a target"),
        ("blockcache draw b", "no command draw"),
        ("blockcache evaluate b --images many", "valid integer"),
        ("python -m blockcache.tools.bench.full_size OUT", "no module"),
        ("python -m blockcache.tools.bench.scale OUT --precission bfloat16", "no option"),
        ("python -m blockcache.tools.demo samples", "no command samples"),
        ("python tools/bench/gpu.py walk KIT", "no command walk"),
        ("python tools/bench/cpu.py run", "no file"),
        ("bash tools/bench/kernels.sh", "no file"),
        ("IMAGES=2 bash tools/research/table1.sh dpm-30", "does not know dpm-30"),
        ("bash tools/dev/wheels.sh [AUTO|NEVER]", "does not know NEVER"),
        ("pip install '.[cpu,exports]'", "no extra exports"),
        ("pip install . --config-settings=cmake.define.BLOCKCACHE_GPU=OFF", "no switch"),
        ("pytest -m cuda", "no marker cuda"),
        ("pytest tests/no_such_folder", "no tests at"),
        ("cmake -S kernels -B build", "no file"),
        ("make all", "not known to this test"),
    ],
)
def test_a_wrong_command_is_seen(command, message):
    pytest.importorskip("typer")
    (found,) = wrong_commands(f"```bash\n{command}   # a comment\n```\n")
    assert message in found


def test_a_wrong_command_is_seen_in_a_sentence():
    text = "Call `blockcache bench\nBUNDLE --round 3`, or `blockcache bench`."
    assert ["No such option" in found for found in wrong_commands(text)] == [True]


def test_a_wrong_preset_is_seen():
    assert wrong_presets("`dpm:20:x1.5`, `dpm-karras-20`") == []
    (found,) = wrong_presets("`dpm:20:z1.5`")
    assert "Expected a policy" in found


# -- links and files -------------------------------------------------------------------------------


def anchors(text):
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(path, text):
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text() if file else text)
        ):
            found.append(link)
    return found


def missing_files(path, text):
    """Source files in inline code that are neither beside the page, nor anywhere below the root."""
    names = [
        code for code in inline_code(text) if re.fullmatch(r"[\w./-]+\.(py|sh|cuh?|cpp)", code)
    ]
    rooms = ("export", "kernels", "runtime", "tools", "tests")
    sources = [file.as_posix() for room in rooms for file in (ROOT / room).rglob("*.*")]
    return [
        name
        for name in names
        if not (path.parent / name).is_file()
        and not any(source.endswith(f"/{name}") for source in sources)
    ]


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_links_and_files_exist(path):
    text = path.read_text()
    assert dead_links(path, text) == []
    assert missing_files(path, text) == []


def test_a_dead_link_is_seen():
    text = "# A page, here\n[a](no.md) [b](README.md#no) [c](#a-page-here) [d](#page) `no.py`"
    readme = ROOT / "README.md"
    assert dead_links(readme, text) == ["no.md", "README.md#no", "#page"]
    assert missing_files(readme, text) == ["no.py"]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES
