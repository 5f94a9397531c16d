"""For the reference: a field's words stand in its annotation, or behind it; here they become its docstring.

`n: Annotated[int, Meta(ge=1, description="answers to one prompt")] = 1` is shown as `n: int = 1` and these words.
"""

import ast

from griffe import Attribute, Docstring, Extension, Inspector, Module, ObjectNode, Visitor, get_expression


class Fields(Extension):
    """Runs when something has been read."""

    def on_attribute_instance(
        self, *, node: ast.AST | ObjectNode, attr: Attribute, agent: Visitor | Inspector, **kwargs: object
    ) -> None:
        if not isinstance(node, ast.AnnAssign) or attr.docstring is not None or not attr.parent.is_class:
            return
        attr.labels -= {"class-attribute", "instance-attribute"}  # a field is what everybody expects here
        words = [text for meta in _metas(node.annotation) for text in _words(meta)]
        _, _, comment = attr.lines[-1].partition("  # ") if attr.lines else ("", "", "")
        if words or comment:
            attr.docstring = Docstring("; ".join([*words, *([comment] if comment else [])]), parent=attr)
        attr.annotation = get_expression(_bare(node.annotation), parent=attr.parent)

    def on_module_members(self, *, mod: Module, **kwargs: object) -> None:
        """A tree is drawn as it stands."""
        if mod.docstring is not None:
            parts = mod.docstring.value.split("\n\n")
            mod.docstring.value = "\n\n".join(f"```text\n{part}\n```" if "├──" in part else part for part in parts)


def _metas(annotation: ast.expr) -> list[ast.Call]:
    return [each for each in ast.walk(annotation) if isinstance(each, ast.Call)]


def _words(meta: ast.Call) -> list[str]:
    """`description`, and its bounds."""
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in meta.keywords}
    description = [ast.literal_eval(said["description"])] if "description" in said else []
    bounds = [f"{sign} {said[name]}" for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<=")) if name in said]
    return description + ([f"({', '.join(bounds)})"] if bounds else [])


class _Bare(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            return node.slice.elts[0]
        return node


def _bare(annotation: ast.expr) -> ast.expr:
    return _Bare().visit(ast.parse(ast.unparse(annotation), mode="eval").body)
