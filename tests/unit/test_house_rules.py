"""The rules that no linter knows, held over every file of the checkout."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT_VLLM = (
    "tests/support/",
    "plugins/",
    "tests/engine/",
    "tests/server/",
    "benchmarks/",
    "demo/",
)
SHIPPED = ("steerserve/", "plugins/", "demo/", "benchmarks/", "examples/", "scripts/")
BUILT = {"__pycache__", "build", "dist"}
UNSAFE_FORMATS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CORE_FREE_OF = {"cli", "experiments", "judging", "server", "theory", "training"}
OWN_FILE = re.compile(
    r"(?<![\w/.:*-])(?:tests|docs|steerserve|plugins|benchmarks|demo|scripts|examples)/[\w./-]*\w"
)
# What is yet to be written: by a GPU's benchmark, and by `demo.cards` into the folder that it is given.
NO_FILES = {"benchmarks/results/gpu.json", "demo/sae"}
# In pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(r"/(wo" r"rk|fa" r"rm|opt/wh" r"eels)/")
REGISTRY_HOST = re.compile(r"py" r"pi\.org|python" r"hosted|registry\.npm" r"js|deb\.deb" r"ian")


@cache
def checkout() -> tuple[str, ...]:
    """Files that are or would be committed; where there is no git, all but hidden and built ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = listed.stdout.split("\0")
    else:
        inner = [found.relative_to(ROOT) for found in ROOT.rglob("*")]
        paths = [
            path.as_posix()
            for path in inner
            if not BUILT & set(path.parts) and not any(part.startswith(".") for part in path.parts[:-1])
        ]
    return tuple(sorted(path for path in paths if path and (ROOT / path).is_file()))


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def python_files(*folders: str) -> list[str]:
    return [path for path in checkout() if path.endswith(".py") and path.startswith(folders or "")]


def imports(path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) for each import anywhere in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: str, name: str) -> Iterator[ast.Call]:
    return (
        node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    )


def keyword(call: ast.Call, name: str) -> object:
    """The literal given for a keyword, None where it is absent or no literal."""
    given = next((word.value for word in call.keywords if word.arg == name), None)
    return given.value if isinstance(given, ast.Constant) else None


def ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, as ruff's RUF022 sorts `__all__`."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


def exported(path: str) -> list[str] | None:
    for node in tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets) and value:
            return list(ast.literal_eval(value))
    return None


def test_vllm_is_imported_only_where_the_engine_is_met() -> None:
    offenders = [
        f"{path}:{line}"
        for path in python_files()
        if not path.startswith(MAY_IMPORT_VLLM)
        for line, module in imports(path)
        if module.split(".")[0] == "vllm"
    ]
    assert not offenders, "`import vllm` belongs in plugins/"


def test_the_library_never_imports_what_is_built_on_it() -> None:
    above = {"steerserve_vllm", "demo", "benchmarks", "examples", "tests"}
    offenders = [
        f"{path}:{line} imports {module}"
        for path in python_files("steerserve/")
        for line, module in imports(path)
        if module.split(".")[0] in above
    ]
    assert not offenders


def test_the_core_never_imports_the_server_the_trainer_or_the_command_line() -> None:
    offenders = [
        f"{path}:{line} imports {module}"
        for path in python_files("steerserve/")
        if not CORE_FREE_OF & set(Path(path).with_suffix("").parts) and Path(path).name != "__main__.py"
        for line, module in imports(path)
        if module.startswith("steerserve.") and module.split(".")[1] in CORE_FREE_OF
    ]
    assert not offenders


def test_nothing_that_ships_reads_or_writes_pickles() -> None:
    offenders = [
        f"{path}:{line} imports {module}"
        for path in python_files(*SHIPPED)
        for line, module in imports(path)
        if module.split(".")[0] in UNSAFE_FORMATS
    ]
    offenders += [
        f"{path}:{call.lineno} allows pickles in an .npy"
        for path in python_files(*SHIPPED)
        for name in ("np.load", "numpy.load")
        for call in calls(path, name)
        if keyword(call, "allow_pickle") is True
    ]
    assert not offenders


def test_torch_load_is_always_told_to_read_weights_only() -> None:
    offenders = [
        f"{path}:{call.lineno}"
        for path in python_files()
        for call in calls(path, "torch.load")
        if keyword(call, "weights_only") is not True
    ]
    assert not offenders, "torch.load without weights_only=True runs what the file says"


@pytest.mark.parametrize("path", [path for path in python_files() if exported(path) is not None])
def test_what_a_module_exports_is_sorted(path: str) -> None:
    names = exported(path)
    assert names == sorted(names or [], key=ruff_order)


@pytest.mark.parametrize(
    "pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "package registry's host"]
)
def test_no_file_names_a_machine_or_a_registry(pattern: re.Pattern[str]) -> None:
    offenders = []
    for path in checkout():
        content = (ROOT / path).read_bytes()
        if b"\0" in content[:8192] or path == "CHANGELOG.md":
            continue
        text = content.decode("utf-8", errors="replace")
        offenders += [
            f"{path}:{number}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)
        ]
    assert not offenders


def test_every_file_that_is_named_exists() -> None:
    known = {part.as_posix() for path in checkout() for part in (Path(path), *Path(path).parents)}
    offenders = [
        f"{path}:{number} names {name}"
        for path in checkout()
        if path.endswith((".md", ".py", ".toml", ".sh", ".yml", "Makefile")) and path != "CHANGELOG.md"
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        for name in OWN_FILE.findall(line)
        if name not in known | NO_FILES
    ]
    assert not offenders


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["train"], *extras["dev"]]
    named = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in wanted}
    assert named <= set(pins()), "in pyproject.toml, but not in constraints.txt"


def test_a_tested_version_names_no_address_and_no_build() -> None:
    lines = constraint_lines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+", line) for line in lines)
    assert len(pins()) == len(lines), "one line per package"


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in constraint_lines())
