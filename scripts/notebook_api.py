"""The notebook's imports, constants, functions and classes as a module, made without running anything else of it."""

import ast
import json
import sys
import types
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent.parent / "QLoRA_BERT_TextClassification.ipynb"


def is_definition(node: ast.stmt) -> bool:
    """Tell whether a statement imports, defines, or names a constant, and does nothing else."""
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        return bool(names) and all(name[0].isupper() and len(name) > 1 for name in names)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def import_definitions() -> types.ModuleType:
    """Return the definitions of the notebook's code cells as the module `notebook_definitions`."""
    module = types.ModuleType("notebook_definitions")
    sys.modules[module.__name__] = module  # pydantic and multiprocessing look names up there
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for index, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        tree.body = [node for node in tree.body if is_definition(node)]
        exec(compile(tree, f"<code cell {index + 1}>", "exec"), module.__dict__)
    return module
