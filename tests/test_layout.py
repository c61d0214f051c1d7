"""The layout of DESIGN.md holds: who may import whom, what is packaged, and what the format's page names."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = {"converter": "salr.converter", "formats": "salr.formats", "salr": "salr"}
if (ROOT / "cuda").is_dir():
    FOLDERS["cuda"] = "salr.cuda"

#: package -> the packages of ours that it may import; the longest matching name decides
MAY_IMPORT = {
    "salr.formats": {"salr.formats"},
    "salr.converter": {"salr.formats", "salr.converter"},
    "salr.cuda": {"salr.formats", "salr.cuda"},
    "salr.runtime": {"salr.formats", "salr.runtime"},
    "salr.integrations": {"salr.formats", "salr.converter", "salr.runtime", "salr.integrations"},
    "salr.training": {"salr.formats", "salr.converter", "salr.runtime", "salr.training"},
    "salr.evaluation": {"salr.formats", "salr.converter", "salr.runtime", "salr.evaluation"},
    "salr.onnx": {"salr.formats", "salr.converter", "salr.runtime", "salr.onnx"},
}
#: what formats needs, besides the standard library
FORMATS_NEEDS = {"numpy", "safetensors", "xxhash"}
HEAVY = {"torch", "transformers", "numba", "cupy", "onnx", "onnxruntime", "peft", "ray", "matplotlib"}


def modules() -> dict[str, Path]:
    """Return every module of ours under the name it is imported by."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the absolute names of the modules that one module imports; blocks under TYPE_CHECKING are left out."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            found |= {f"{origin}.{alias.name}" for alias in node.names} if node.level else {origin}
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)
    return found


def package_of(name: str) -> str | None:
    """Return the package of ours whose rule a module falls under."""
    fitting = [package for package in MAY_IMPORT if name == package or name.startswith(package + ".")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("name", [name for name in MODULES if package_of(name)])
def test_a_module_imports_only_what_its_folder_may(name):
    for imported in imports(name, MODULES[name]):
        if imported.split(".")[0] == "salr":
            assert package_of(imported) in MAY_IMPORT[package_of(name)], f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("salr.formats")])
def test_formats_needs_numpy_safetensors_and_xxhash_only(name):
    roots = {imported.split(".")[0] for imported in imports(name, MODULES[name])} - {"salr"}
    assert roots <= FORMATS_NEEDS | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", MODULES)
def test_between_our_folders_imports_are_relative(name):
    wrong = {"converter", "formats", "cuda", "salr"}
    absolute = [
        node.module or ""
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0
    ]
    assert not [module for module in absolute if module.split(".")[0] in wrong]


@pytest.mark.parametrize("name", [name for name in MODULES if name == "salr" or name.startswith("salr.cli")])
def test_the_front_door_and_the_command_line_import_nothing_heavy_at_their_top(name):
    found = imports(name, MODULES[name], top_level_only=True)
    assert not {imported.split(".")[0] for imported in found} & HEAVY
    assert not [imported for imported in found if imported.startswith(("salr.converter", "salr.runtime", "salr.cuda"))]


def test_every_package_of_the_tree_is_packaged_and_no_other():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    with_code = {path.parent for path in MODULES.values()} | {path.parent for path in ROOT.glob("cuda/**/*.cu")}
    in_tree = {package_name(folder) for folder in with_code}
    assert set(settings["packages"]) == in_tree and len(settings["packages"]) == len(in_tree)
    folders = settings["package-dir"]
    assert {package: FOLDERS[folder] for package, folder in folders.items() if folder in FOLDERS} == {
        package: package for package in FOLDERS.values()
    }
    assert {package: package_name(ROOT / folder) for package, folder in folders.items()} == {
        package: package for package in folders
    }


def package_name(folder: Path) -> str:
    first, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[first], *rest])


def test_every_package_but_cuda_has_an_init_file():
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").is_file() or folder.relative_to(ROOT).parts[0] == "cuda"
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_shim_is_in_the_source_distribution():
    assert "cli.py" in (ROOT / "MANIFEST.in").read_text().split()


def test_no_module_carries_a_name_that_nvidia_uses():
    taken = {"bindings", "core", "pathfinder", "cudart", "nvrtc", "compute"}
    assert not [path for name, path in MODULES.items() if name.startswith("salr.cuda") and path.stem in taken]


def test_the_public_names_all_exist():
    import salr

    assert [name for name in salr.__all__ if getattr(salr, name, None) is None] == []
    with pytest.raises(AttributeError, match="module 'salr' has no attribute 'nothing'"):
        salr.nothing  # noqa: B018


def test_the_version_is_the_projects():
    import salr

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == salr.__version__


def manifest_keys(value: object, path: tuple[str, ...] = ()) -> set[str]:
    """Return the keys that the format itself gives meaning to; names of modules, tensors and options are free."""
    free = {("modules",), ("checksums",), ("options",), ("source",), ("environment",)}
    if isinstance(value, list):
        return set().union(*(manifest_keys(inner, path) for inner in value))
    if not isinstance(value, dict):
        return set()
    own = set() if path in free else set(value)
    return own.union(*(manifest_keys(inner, (*path, key)) for key, inner in value.items()))


def test_the_page_of_the_format_names_every_manifest_key_and_choice(golden):
    import json

    from salr.formats.manifest import FATES, PATTERNS, VALUES_FROM
    from salr.formats.reader import SalrFile
    from salr.formats.values import ENCODINGS

    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "format.md").read_text()))
    keys = manifest_keys(json.loads(bytes(SalrFile(golden).raw("salr.manifest"))))
    assert {"nnz", "scaling", "fate", "energy"} <= keys
    assert keys - named == set()
    assert {*FATES, *PATTERNS, *VALUES_FROM, *ENCODINGS} - named == set()


def test_the_page_of_the_format_gives_the_code_book_of_nf4():
    from salr.formats.values import NF4_CODE_BOOK

    page = (ROOT / "docs" / "format.md").read_text()
    assert all(str(float(repr(float(code)))) in page for code in NF4_CODE_BOOK)


def test_no_test_file_is_longer_than_400_lines():
    assert [path.name for path in (ROOT / "tests").rglob("*.py") if len(path.read_text().splitlines()) > 400] == []
