"""LaTeX into pictures, and formulas to draw: the data of the quickstart."""

from vlmtune.formulas.draw import Font, FormulaError, render, write_formula_table
from vlmtune.formulas.grammar import formulas, random_formula, random_tree
from vlmtune.formulas.notation import Node, latex, said, split_of

__all__ = [
    "Font",
    "FormulaError",
    "Node",
    "formulas",
    "latex",
    "random_formula",
    "random_tree",
    "render",
    "said",
    "split_of",
    "write_formula_table",
]
