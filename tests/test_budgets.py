"""Budgets of the source: sizes over theirs are printed (`pytest -s` shows them), and fail at twice as much.

What has no budget: every public name has a docstring, every public argument and result an annotation.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

#: Dataclasses here are lists of a configuration's keys.
KEYS = ("conf/", "data/datamodule.py")
FILE_LINES, FUNCTION_LINES, CONSTRUCTOR_ARGUMENTS = 400, 60, 10
#: Methods that implement an interface of these have its documentation.
FOREIGN_METHODS = {
    "Module": {"forward", "train"},
    "LightningModule": {"forward", "train", "training_step", "configure_optimizers", "optimizer_step"},
    "Callback": {"on_"},
    "Dataset": {"__getitem__", "__len__"},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """Something measured, and how much of it is wanted at most."""

    where: str
    what: str
    value: int
    budget: int


def sizes(tree: Mapping[str, str]) -> Iterator[Size]:
    """Lines of every file and function, arguments of every constructor."""
    for path, text in tree.items():
        yield Size(path, "lines of a file", len(text.splitlines()), FILE_LINES)
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, Function):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Size(f"{path}:{node.lineno} {node.name}", "lines of a function", lines, FUNCTION_LINES)
            if isinstance(node, Function) and node.name == "__init__":
                count = len(parameters(node)) - 1
                yield Size(
                    f"{path}:{node.lineno}", "arguments of a constructor", count, CONSTRUCTOR_ARGUMENTS
                )
            # In conf/, and where a configuration's keys are declared, nobody passes the fields.
            if isinstance(node, ast.ClassDef) and is_dataclass(node) and not path.startswith(KEYS):
                count = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                yield Size(
                    f"{path}:{node.lineno}", "arguments of a constructor", count, CONSTRUCTOR_ARGUMENTS
                )


def is_dataclass(node: ast.ClassDef) -> bool:
    """Whether a class's constructor is made from its fields."""
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def parameters(function: Function) -> list[ast.arg]:
    """All of a function's parameters, `self` included."""
    arguments = function.args
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]


def undocumented(tree: Mapping[str, str]) -> Iterator[str]:
    """Public names without a docstring, of their own or of the interface they implement."""
    parsed = {path: ast.parse(text, path) for path, text in tree.items()}
    classes = {
        n.name: n for module in parsed.values() for n in ast.walk(module) if isinstance(n, ast.ClassDef)
    }
    for path, module in parsed.items():
        if not ast.get_docstring(module):
            yield f"{path}: the file has no docstring"
        for owner, node in public_names(module):
            inherited = owner is not None and node.name in interface(owner, classes)
            if not ast.get_docstring(node) and not inherited:
                yield f"{path}:{node.lineno}: {node.name} has no docstring"


def public_names(module: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.ClassDef | Function]]:
    """Public classes and functions of a file, and public methods of its public classes with their class."""
    for node in module.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield None, node
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, Function) and not item.name.startswith("_"):
                        yield node, item


class _Prefixed(set[str]):
    """A set that also holds what begins with one of its members ending in `_`."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or any(m.endswith("_") and str(name).startswith(m) for m in self)


def interface(owner: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> _Prefixed:
    """Names of documented methods among the bases of a class."""
    names = _Prefixed()
    for base in owner.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        names |= FOREIGN_METHODS.get(name, set())
        if name in classes and classes[name] is not owner:
            items = [item for item in classes[name].body if isinstance(item, Function)]
            names |= {item.name for item in items if ast.get_docstring(item)}
            names |= interface(classes[name], classes)
    return names


def unannotated(tree: Mapping[str, str]) -> Iterator[str]:
    """Parameters and results of public functions that have no annotation."""
    for path, text in tree.items():
        for owner, node in public_functions(ast.parse(text, path)):
            is_method = owner and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            for argument in parameters(node)[1 if is_method else 0 :]:
                if argument.annotation is None:
                    yield f"{path}:{node.lineno}: {node.name}: {argument.arg} has no annotation"
            if node.returns is None:
                yield f"{path}:{node.lineno}: {node.name}: the result has no annotation"


def public_functions(module: ast.Module) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """Public functions and methods, constructors and other dunder methods included."""
    for node in module.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield None, node
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, Function) and (
                    item.name.startswith("__") or not item.name.startswith("_")
                ):
                    yield node, item


def test_sizes_stay_below_twice_their_budget(sources: dict[str, str]) -> None:
    measured = list(sizes(sources))
    over = sorted((s for s in measured if s.value > s.budget), key=lambda s: (s.what, -s.value / s.budget))
    for each in over:
        print(f"{each.value:5} {each.what} (budget {each.budget})  {each.where}")
    assert [each for each in over if each.value >= 2 * each.budget] == []


def test_every_public_name_has_a_docstring(sources: dict[str, str]) -> None:
    assert list(undocumented(sources)) == []


def test_every_public_argument_is_annotated(sources: dict[str, str]) -> None:
    assert list(unannotated(sources)) == []


# --- the checkers, checked ----------------------------------------------------------------------------------


def test_sizes_are_measured() -> None:
    arguments = ", ".join(f"a{i}" for i in range(21))
    body = "\n".join("        pass" for _ in range(120))
    record = "@dataclass\nclass B:\n    x: int\n    y: int\n"
    text = f"class A:\n    def __init__(self, {arguments}):\n{body}\n\n{record}"
    found = {(s.what, s.value) for s in sizes({"a.py": text})}
    assert found == {
        ("lines of a file", len(text.splitlines())),
        ("lines of a function", 121),
        ("arguments of a constructor", 21),
        ("arguments of a constructor", 2),
    }
    assert len(list(sizes({"conf/a.py": record}))) == 1


FILE = '"""A file."""\n'


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def _f(): ...", 1),
        (FILE + "def f(): ...", 1),
        (FILE + "async def f(): ...", 1),
        (FILE + "class A:\n  def f(self): ...", 2),
        (FILE + "class A:\n  'A.'\n  def __len__(self): ...\n  def _f(self): ...", 0),
        (FILE + "class A(nn.Module):\n  'A.'\n  def forward(self): ...\n  def g(self): ...", 1),
        (FILE + "class A(Callback):\n  'A.'\n  def on_fit_start(self): ...", 0),
        (FILE + "class A:\n  'A.'\n  def f(self): 'F.'\nclass B(A):\n  'B.'\n  def f(self): ...", 0),
        (FILE + "class A:\n  'A.'\n  def f(self): ...\nclass B(A):\n  'B.'\n  def f(self): ...", 2),
    ],
)
def test_missing_docstrings_are_found(text: str, count: int) -> None:
    assert len(list(undocumented({"a.py": text}))) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(a, *b, c=1, **d) -> int: ...", 4),
        ("def f(a: int): ...", 1),
        ("def _f(a): ...", 0),
        ("class A:\n  def __init__(self, a) -> None: ...\n  def _f(self, a): ...", 1),
        ("class A:\n  @staticmethod\n  def f(a) -> None: ...", 1),
        ("class A:\n  @classmethod\n  def f(cls) -> None: ...", 0),
    ],
)
def test_missing_annotations_are_found(text: str, count: int) -> None:
    assert len(list(unannotated({"a.py": text}))) == count
