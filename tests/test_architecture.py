"""Direction, doors and layout, held by reading the sources. Every guard is seen to fire."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from blockcache import export

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("runtime", "export", "kernels", "tools")


class Import(NamedTuple):
    """One import as it stands in a file."""

    file: str  # "export/model.py"
    module: str  # absolute: "blockcache.runtime.plan"
    names: tuple[str, ...]  # of ``from module import names``; () for ``import module``
    eager: bool  # runs whenever the file is imported and fails if the module is missing

    @property
    def top(self):
        """The package: "torch" of "torch.nn"."""
        return self.module.split(".")[0]

    @property
    def blockcache_modules(self):
        """What it reaches of blockcache, as ("runtime", "plan", "Dim"); () for other packages."""
        if self.top != "blockcache":
            return ()
        paths = [f"{self.module}.{name}" for name in self.names] or [self.module]
        return tuple(tuple(path.split(".")[1:4]) for path in paths)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def catches_import_error(node):
    return isinstance(node, ast.Try) and any(
        handler.type is not None and "ImportError" in ast.unparse(handler.type)
        for handler in node.handlers
    )


def imports_of(root, path):
    """Every import of a file, wherever it stands; relative ones are made absolute."""
    file = path.relative_to(root).as_posix()
    package = ["blockcache", *path.relative_to(root).parts[:-1]]
    found = []

    def visit(node, eager):
        if isinstance(node, ast.Import):
            found.extend(Import(file, alias.name, (), eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append(Import(file, module, tuple(alias.name for alias in node.names), eager))
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = is_type_checking(node) or catches_import_error(node)
        for child in ast.iter_child_nodes(node):
            visit(child, eager and not lazy and not guarded)

    visit(ast.parse(path.read_text()), True)
    return found


def sources(root, *rooms):
    return [path for room in rooms for path in sorted((root / room).rglob("*.py"))]


def all_imports(root, *rooms):
    return [found for path in sources(root, *rooms) for found in imports_of(root, path)]


def plant(root, file, text):
    """A source file in a made-up checkout."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


# -- direction: tools -> export -> runtime -> kernels ----------------------------------------------

BELOW = {
    "tools": ("tools", "export", "runtime", "kernels", "__version__"),
    "export": ("export", "runtime"),
    "runtime": ("runtime", "kernels"),
    "kernels": ("kernels",),
}
EXPORT_MAY_USE = (
    ("plan",), ("provenance",), ("run_table",), ("solvers",),
    ("errors",), ("files",),
    ("bundles", "bundle"), ("bundles", "bundle_files"), ("bundles", "manifest"),
    ("bundles", "tensor_files"), ("bundles", "strict_json"),
    ("engines", "files"), ("engines", "onnxruntime_library"),
)  # fmt: skip
"""Plain data types, errors, how files are written, and the door to ONNX Runtime."""

BUILD_MAY_USE = (*EXPORT_MAY_USE, ("engines", "tensorrt_library"), ("devices", "cuda_driver"))
"""``export/engines/`` goes through the runtime's doors to TensorRT and the GPU, so that there is
one of each."""

KERNELS_DOOR = "export/unet/torch_kernels.py"
"""The only file of ``export`` that reaches the kernels."""


def wrong_arrows(root):
    """Imports of blockcache against the direction."""
    found = []
    for item in all_imports(root, *ROOMS):
        room = item.file.split("/")[0]
        allowed = BUILD_MAY_USE if item.file.startswith("export/engines/") else EXPORT_MAY_USE
        if item.top in ROOMS:
            found.append(f"{item.file}: bare {item.module}")
        for reached in item.blockcache_modules:
            inside = reached[1:] in allowed or reached[1:2] in allowed
            if item.file == KERNELS_DOOR and reached == ("kernels",):
                continue
            if reached[0] not in BELOW[room]:
                found.append(f"{item.file}: {item.module}")
            elif room == "export" and reached[0] == "runtime" and not inside:
                found.append(f"{item.file}: {item.module} {item.names}")
    return found


def test_imports_go_one_way():
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("runtime/a.py", "from blockcache.export.unet.load import load_model"),
        ("runtime/a.py", "def f():\n    import blockcache.tools.cli"),
        ("runtime/a.py", "from blockcache import export"),
        ("runtime/a.py", "from ..export import model"),
        ("kernels/a.py", "from blockcache.runtime import plan"),
        ("export/a.py", "from blockcache.tools import cli"),
        ("export/a.py", "from blockcache import kernels"),
        ("export/a.py", "from blockcache.kernels import check"),
        ("export/unet/torch_kernels.py", "from blockcache.kernels._library import cuda_library"),
        ("export/a.py", "from blockcache.runtime.session import Session"),
        ("export/a.py", "from blockcache.runtime import Session"),
        ("export/a.py", "from blockcache.runtime.devices.cuda_driver import device_capability"),
        ("export/graph/passes/a.py", "import blockcache.runtime"),
        ("export/graph/passes/a.py", "from ....runtime import session"),
        ("tools/a.py", "import runtime.plan"),
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path, file, text):
    assert len(wrong_arrows(plant(tmp_path, file, text))) == 1


def test_right_arrows_pass(tmp_path):
    plant(tmp_path, "export/a.py", "from blockcache.runtime import plan\nfrom .passes import b")
    plant(tmp_path, "export/graph/passes/b.py", "from blockcache.runtime.errors import ConfigError")
    plant(tmp_path, "export/unet/torch_kernels.py", "from blockcache import kernels")
    plant(
        tmp_path,
        "export/engines/engine.py",
        "from blockcache.runtime.engines import tensorrt_library",
    )
    plant(tmp_path, "runtime/a.py", "from blockcache import kernels\nfrom .plan import Dim")
    plant(tmp_path, "tools/a.py", "from blockcache.runtime import Session")
    assert wrong_arrows(tmp_path) == []


# -- no circles ------------------------------------------------------------------------------------


def import_graph(root, room):
    """Per module of a room, the modules of it that it imports, lazily or not: dotted names."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sources(root, room)
    }
    graph = {name: set() for name in modules}
    for item in all_imports(root, room):
        importer = item.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in item.names or ("",):
            inner = f"{item.module}.{name}".removeprefix("blockcache.").rstrip(".")
            reached = inner if inner in modules else inner.rpartition(".")[0]
            if reached in modules and reached != importer:
                graph[importer].add(reached)
    return graph


def by_folder(graph):
    """The same between the folders of a room; a module at the top stands for itself."""
    folders = {}
    for importer, reached in graph.items():
        place = ".".join(importer.split(".")[:2])
        others = {".".join(name.split(".")[:2]) for name in reached}
        folders.setdefault(place, set()).update(others - {place})
    return folders


def circle(graph):
    """A circle of a graph, as names; [] where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def without_doors(graph):
    """Leave out packages' ``__init__``: they export what is inside."""
    inside = {name for name in graph if not any(o.startswith(f"{name}.") for o in graph)}
    return {name: graph[name] & inside for name in inside}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_of_a_room_form_no_circle(room):
    graph = without_doors(import_graph(ROOT, room))
    assert circle(graph) == []
    if room != "tools":  # its folders have a test of their own, below
        assert circle(by_folder(graph)) == []


EXPORT_FLOORS = ("pipeline", "preset_maker", "measurements", "align", "choose", "measure", "unet")
"""From the order of the stages down to the model: none imports one that stands before it."""


def test_the_stages_of_export_lie_in_order():
    folders = by_folder(without_doors(import_graph(ROOT, "export")))
    for place, name in enumerate(EXPORT_FLOORS):
        above = {f"export.{other}" for other in EXPORT_FLOORS[:place]}
        assert not folders[f"export.{name}"] & above, name


RUNTIME_FLOORS = ("runtime.session", "runtime.program", "runtime.engines", "runtime.devices")


def test_devices_lie_below_engines_and_engines_below_the_session():
    folders = by_folder(without_doors(import_graph(ROOT, "runtime")))
    for floor, name in enumerate(RUNTIME_FLOORS):
        assert not folders[name] & set(RUNTIME_FLOORS[:floor]), name


@pytest.mark.parametrize(
    "files",
    [
        {"a": "from blockcache.runtime import b", "b": "def f():\n    import blockcache.runtime.a"},
        {"x/a": "from blockcache.runtime.y.b import c", "y/b": "", "y/d": "from ..x.a import e"},
    ],
)
def test_a_circle_is_seen(tmp_path, files):
    for name, text in files.items():
        plant(tmp_path, f"runtime/{name}.py", text)
    graph = import_graph(tmp_path, "runtime")
    assert circle(graph) or circle(by_folder(graph))


# -- folders of tools: none imports one above it ---------------------------------------------------

TOOLS_MAY_USE = {
    "report": (),
    "demo": ("report",),
    "sources": ("demo",),
    "check": (),
    "comfyui": (),
    "serve": ("report",),
    "bench": ("sources", "demo", "report", "check"),
    "evaluation": ("sources", "demo", "report"),
    "research": ("evaluation", "bench", "sources", "demo", "report"),
    "commands": ("evaluation", "bench", "check", "sources", "demo", "report"),
    "dev": ("report",),
}
"""Each folder of ``tools`` and those below it. The files beside them are the command line's frame:
they may use every folder, and of the folders ``commands`` alone may use them."""

DEMO_ROOMS = ("autoencoder", "concepts", "contexts", "data", "model", "parts", "prompts")
"""What others may use of the demo: its model and its data, and nothing of the training."""


def wrong_tools_arrows(root):
    """Imports between the folders of ``tools`` that go up, or into the demo's training."""
    found = []
    for item in all_imports(root, "tools"):
        folder = item.file.split("/")[1]
        for reached in item.blockcache_modules:
            if folder.endswith(".py") or reached[0] != "tools" or reached[1:2] in ((), (folder,)):
                continue
            to_frame = reached[1] not in TOOLS_MAY_USE and folder == "commands"
            trained = reached[1] == "demo" and reached[2:3] and reached[2] not in DEMO_ROOMS
            if (reached[1] not in TOOLS_MAY_USE[folder] and not to_frame) or trained:
                found.append(f"{item.file}: {'.'.join(reached)}")
    return found


def test_folders_of_tools_import_one_way():
    assert wrong_tools_arrows(ROOT) == []
    for place, folder in enumerate(TOOLS_MAY_USE):  # each stands behind those that it may use
        assert set(TOOLS_MAY_USE[folder]) <= set(list(TOOLS_MAY_USE)[:place]), folder


def test_every_folder_of_tools_has_its_arrows():
    folders = {path.name for path in (ROOT / "tools").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(TOOLS_MAY_USE)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "tools/report/a.py",
            "if TYPE_CHECKING:\n    from blockcache.tools.bench.latency import Row",
        ),
        ("tools/demo/a.py", "from blockcache.tools.evaluation import features"),
        ("tools/evaluation/a.py", "def f():\n    from blockcache.tools.demo import train"),
        ("tools/evaluation/a.py", "from blockcache.tools.demo.fit_autoencoder import fit"),
        ("tools/bench/kernels/a.py", "from blockcache.tools.evaluation.report import Row"),
        ("tools/commands/a.py", "import blockcache.tools.research.draw"),
        ("tools/bench/a.py", "from blockcache.tools import cli"),
    ],
)
def test_a_wrong_arrow_between_tools_is_seen(tmp_path, file, text):
    assert len(wrong_tools_arrows(plant(tmp_path, file, text))) == 1


# -- tools take export's public names at its door --------------------------------------------------


def around_the_door(root):
    """Imports of a public name of export from the module that it comes from."""
    return [
        f"{item.file}: {name} from {item.module}"
        for item in all_imports(root, "tools")
        for name in item.names
        if item.module == f"blockcache.export.{export._HOMES.get(name)}"
    ]


def test_tools_come_in_by_the_door_of_export():
    assert around_the_door(ROOT) == []


def test_a_way_around_the_door_is_seen(tmp_path):
    plant(tmp_path, "tools/a.py", "from blockcache.export.pipeline import compile_model")
    plant(tmp_path, "tools/b.py", "from blockcache.export import compile_model")
    plant(tmp_path, "tools/c.py", "from blockcache.export.unet.model import TORCH_DTYPES")
    assert around_the_door(tmp_path) == [
        "tools/a.py: compile_model from blockcache.export.pipeline"
    ]


# -- export is a star: stages do not import each other, only the order does ------------------------


def test_only_the_pipeline_imports_the_pipeline():
    inside = all_imports(ROOT, "export")
    users = {
        i.file for i in inside if ("export", "pipeline") in {r[:2] for r in i.blockcache_modules}
    }
    assert users <= {"export/pipeline.py", "export/__init__.py"}


def test_graph_passes_do_not_reach_out_of_their_folder():
    for item in all_imports(ROOT, "export"):
        if item.file.startswith("export/graph/passes/"):
            for reached in item.blockcache_modules:
                assert reached[0] == "runtime" or reached[1:3] == ("graph", "passes"), item


# -- what the runtime is made of -------------------------------------------------------------------

RUNTIME_NEEDS = {"numpy", "safetensors", "blockcache", "__future__"}


DROP_IN = "runtime/drop_in.py"
"""The only file of the runtime that knows torch, imported when a pipeline asks for it."""


def heavy_runtime_imports(root):
    """Eager imports of the runtime and the kernels beyond the standard library and numpy."""
    return [
        f"{item.file}: {item.module}"
        for item in all_imports(root, "runtime", "kernels")
        if item.eager and item.top not in RUNTIME_NEEDS | set(sys.stdlib_module_names)
        if item.file != DROP_IN
    ]


def test_nothing_of_the_runtime_imports_the_drop_in():
    users = {
        item.file
        for item in all_imports(ROOT, "runtime")
        if ("runtime", "drop_in") in {reached[:2] for reached in item.blockcache_modules}
    }
    assert users <= {"runtime/package/blockcache/diffusers.py"}


def test_the_runtime_imports_numpy_and_little_else():
    assert heavy_runtime_imports(ROOT) == []


@pytest.mark.parametrize(
    "text", ["import torch", "if True:\n    import onnxruntime", "class A:\n    import cuda"]
)
def test_a_heavy_import_is_seen(tmp_path, text):
    assert len(heavy_runtime_imports(plant(tmp_path, "runtime/a.py", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import onnxruntime",
        "try:\n    import onnxruntime\nexcept ImportError:\n    onnxruntime = None",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tensorrt",
    ],
)
def test_a_lazy_import_passes(tmp_path, text):
    assert heavy_runtime_imports(plant(tmp_path, "runtime/a.py", text)) == []


FORBIDDEN = (
    "torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
    "tensorrt", "tensorrt_rtx", "cuda", "typer", "rich", "matplotlib",
)  # fmt: skip
GUARD = f"""
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise SystemExit("imported " + name)  # not ImportError: nothing may swallow it
sys.meta_path.insert(0, Guard())
"""


def import_in_a_guarded_process(tmp_path, statement):
    return subprocess.run(
        [sys.executable, "-c", GUARD + statement], cwd=tmp_path, env=dict(os.environ),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_runtime_is_imported_without_any_framework(tmp_path):
    made = import_in_a_guarded_process(tmp_path, "import blockcache.runtime")
    assert (made.returncode, made.stderr) == (0, "")


def test_the_door_of_export_is_opened_without_any_framework(tmp_path):
    made = import_in_a_guarded_process(tmp_path, "import blockcache.export as e; print(dir(e))")
    assert (made.returncode, made.stderr) == (0, "")
    assert "compile_model" in made.stdout


@pytest.mark.parametrize("statement", ["import torch", "import blockcache.export.unet.model"])
def test_the_guarded_process_sees_a_framework(tmp_path, statement):
    made = import_in_a_guarded_process(tmp_path, statement)
    assert made.returncode == 1
    assert made.stderr.startswith("imported ")


# -- one door per foreign library ------------------------------------------------------------------

DOORS = {
    "diffusers": (
        DROP_IN, "export/unet/", "export/parts/", "tools/bench/", "tools/demo/",
        "tools/dev/", "tools/research/",
    ),
    "transformers": ("tools/demo/", "tools/bench/", "export/unet/text.py", "export/parts/"),
    "tokenizers": ("runtime/pipeline/tokenizer.py", "tools/bench/"),
    "huggingface_hub": ("export/unet/hub.py",),
    "torch": (DROP_IN, "export/", "tools/"),
    "onnx": ("export/", "tools/"),
    "onnx_ir": ("export/",),
    "onnxruntime": ("runtime/engines/onnxruntime_library.py",),
    **dict.fromkeys(
        ("tensorrt", "tensorrt_rtx"),
        ("runtime/engines/trt", "runtime/engines/tensorrt_library.py", "export/engines/",
         "tools/bench/"),
    ),
    "cuda": ("runtime/devices/", "tools/bench/"),
    "polygraphy": ("tools/check/segments.py",),
    "filelock": ("export/",),
    **dict.fromkeys(("comfy", "folder_paths"), ("tools/comfyui/nodes.py",)),
    "ray": ("tools/serve/", "tools/evaluation/ray_workers.py"),
    **dict.fromkeys(("starlette", "pytriton"), ("tools/serve/",)),
    "typer": ("tools/",),
    "rich": ("tools/", "export/engines/report.py"),
    "matplotlib": ("tools/",),
    "PIL": ("tools/",),
    "safetensors": (
        "runtime/bundles/tensor_files.py", "export/unet/weights.py", "export/unet/lora.py",
        "tools/",
    ),
}  # fmt: skip


@functools.cache
def side_doors(root):
    """Imports of a foreign library in a file that is not its door."""
    return sorted(
        {
            f"{item.file}: {item.top}"
            for item in all_imports(root, *ROOMS)
            if not item.file.startswith(DOORS.get(item.top, ("",)))
        }
    )


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_enters_by_its_door(library):
    assert [found for found in side_doors(ROOT) if found.endswith(f": {library}")] == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("export/change.py", "def f():\n    from diffusers import UNet2DConditionModel"),
        ("runtime/session.py", "try:\n    import onnxruntime\nexcept ImportError:\n    pass"),
        ("tools/cli.py", "import tensorrt_rtx"),
        ("runtime/session.py", "from cuda.bindings import runtime"),
        ("export/pipeline.py", "import rich.progress"),
    ],
)
def test_a_side_door_is_seen(tmp_path, file, text):
    assert len(side_doors(plant(tmp_path, file, text))) == 1


# -- layout ----------------------------------------------------------------------------------------

FOLDERS = {"export", "runtime", "kernels", "tools", "tests"}
FILES = {"README.md", "LICENSE", "CMakeLists.txt", "pyproject.toml"}
MADE_HERE = {"build", "dist", "demo-out", "__pycache__"}  # ignored by git


def strangers(root):
    """Entries of the top level that are not in the design; hidden ones do not count."""
    return sorted(
        entry.name
        for entry in root.iterdir()
        if not entry.name.startswith(".")
        and not entry.name.endswith(".egg-info")
        and entry.name not in (FOLDERS | MADE_HERE if entry.is_dir() else FILES)
    )


def test_the_top_level_holds_what_the_design_names():
    assert strangers(ROOT) == []


def test_a_stranger_at_the_top_level_is_seen(tmp_path):
    plant(tmp_path, "export/a.py", "")
    plant(tmp_path, "README.md", "")
    assert strangers(tmp_path) == []
    plant(tmp_path, "utils/a.py", "")
    plant(tmp_path, "notes.txt", "")
    assert strangers(tmp_path) == ["notes.txt", "utils"]


def test_ignored_folders_are_the_ones_that_git_ignores():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert all({f"/{name}/", f"{name}/"} & set(ignored) for name in MADE_HERE)


VAGUE = {"utils", "util", "helpers", "common", "core", "misc"}


def vague_names(root):
    return [path.name for path in sources(root, *ROOMS) if path.stem in VAGUE]


def test_no_file_is_called_utils():
    """A file's name excludes every other file's content."""
    assert vague_names(ROOT) == []


def test_a_vague_name_is_seen(tmp_path):
    assert vague_names(plant(tmp_path, "export/graph/passes/utils.py", "")) == ["utils.py"]


def test_no_file_hides_a_module_of_the_standard_library():
    """Run from its own folder, such a file would be imported instead."""
    hidden = {"profile", "inspect", "types", "select", "trace", "logging", "queue", "copy", "code",
              "platform", "statistics"}  # fmt: skip
    assert not {path.stem for path in sources(ROOT, *ROOMS)} & hidden


# -- nothing is pickled ----------------------------------------------------------------------------


def pickles(root):
    """Calls and imports that write or run pickled code."""
    found = []
    for path in sources(root, *ROOMS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                pickled = any(
                    word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
                    for word in node.keywords
                )
                if called in ("torch.save", "torch.load", "eval", "exec") or pickled:
                    found.append(f"{path.relative_to(root)}: {called}")
    for item in all_imports(root, *ROOMS):
        if item.top in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            found.append(f"{item.file}: {item.module}")
    return found


def test_nothing_is_pickled():
    assert pickles(ROOT) == []


@pytest.mark.parametrize(
    "text",
    ["import pickle", "def f(torch, x):\n    torch.save(x, 'f')", "torch.load('f')",
     "np.load('f', allow_pickle=True)", "eval('1')"],
)  # fmt: skip
def test_a_pickle_is_seen(tmp_path, text):
    assert len(pickles(plant(tmp_path, "tools/a.py", text))) == 1


# -- no test is dead -------------------------------------------------------------------------------


def test_tests_mirror_the_rooms():
    """A folder of tests is named after a room, or is one of the four others."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= {*ROOMS, "golden", "end_to_end", "gpu", "cuda_driver"}
