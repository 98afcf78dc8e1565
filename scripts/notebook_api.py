"""The notebook's imports, constants, functions and classes as a module.

Nothing else of the notebook is run.
"""

import ast
import json
import os
import sys
import types
from pathlib import Path

from dotenv import load_dotenv

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "QLoRA_BERT_TextClassification.ipynb"


def read_environment() -> None:
    """Read `.env`, and write the names of settings in capitals, as scripts ask."""
    load_dotenv(".env")
    for name in list(os.environ):
        if name.upper().startswith("QLORA_"):
            os.environ[name.upper()] = os.environ.pop(name).strip()


def is_constant(target: ast.expr) -> bool:
    """Tell whether the target of an assignment is a name like LIMIT.

    A single letter is none: in the lesson, W is a matrix.
    """
    return isinstance(target, ast.Name) and target.id.isupper() and len(target.id) > 1


def is_definition(node: ast.stmt) -> bool:
    """Tell whether a statement only imports, or defines something."""
    if isinstance(node, ast.Assign):
        return all(is_constant(target) for target in node.targets)
    if isinstance(node, ast.AugAssign):
        return is_constant(node.target)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def import_definitions() -> types.ModuleType:
    """Return the definitions of all code cells as the module `notebook_definitions`."""
    module = types.ModuleType("notebook_definitions")
    # pydantic and multiprocessing look names up there
    sys.modules["notebook_definitions"] = module
    number = 0
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        tree = ast.parse("".join(cell["source"]))
        tree.body = [node for node in tree.body if is_definition(node)]
        exec(compile(tree, f"<code cell {number}>", "exec"), module.__dict__)
    return module
