"""A contract for import-linter: no module imports itself by way of others.

import-linter's own `acyclic_siblings` compares folders; two folders may lean on each other's files
here as long as no file leans on itself.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

__all__ = ["AcyclicModules"]


class AcyclicModules(Contract):
    """Kept if no import chain leads from a module of `packages` back to it."""

    type_name = "acyclic_modules"

    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look for a circle."""
        wanted = tuple(f"{package}." for package in self.packages)  # type: ignore[attr-defined]
        circles = []
        done: set[str] = set()
        for module in sorted(graph.modules):
            if module in done or not module.startswith(wanted):
                continue
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                chain = graph.find_shortest_chain(importer=imported, imported=module)
                if chain is not None and not done & set(chain):
                    circles.append((module, *chain))
                    done |= set(chain)
                    break
        return ContractCheck(kept=not circles, metadata={"circles": circles})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line a circle."""
        for circle in check.metadata["circles"]:
            output.print_error(" -> ".join(circle))
