"""What a set of names needs of the package: the definitions that they refer to, directly or through others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tpcompress.export.remote_code.source import Binding, Definition, Module, bindings_of, file_of, read_module

ALLOWED = {"torch", "transformers", "safetensors"} | sys.stdlib_module_names
"""What the code of an export may import."""

Name = tuple[str, str]
"""A module and a name that it defines."""


class CannotCarryCode(ValueError):
    """An export cannot carry its code; with the reason."""


@dataclass
class Needed:
    """What is needed of one module: definitions by their start, and the names that it imports."""

    module: Module
    definitions: dict[int, Definition] = field(default_factory=dict)
    imported: dict[str, Binding] = field(default_factory=dict)


class Closure:
    """The definitions that some names need, by module.

    Args:
        read: returns a module by its name.
    """

    def __init__(self, read: Callable[[str], Module] = read_module) -> None:
        self.read = read
        self.modules: dict[str, Needed] = {}

    def add(self, names: Iterable[Name]) -> None:
        """Add names and all that they need.

        Raises:
            CannotCarryCode: something imports a package that not every user of transformers has.
        """
        todo = list(names)
        while todo:
            module, name = todo.pop()
            todo += self._module(module)
            needed = self.modules[module]
            todo += self._definition(needed, needed.module.definitions[name])

    def resolve(self, binding: Binding) -> Binding:
        """Where an imported name of the package is defined, not where it is imported again."""
        while binding.ours and binding.name is not None:
            module = self.read(binding.module)
            if binding.name in module.definitions:
                return binding
            if binding.name not in module.bindings:
                raise AssertionError(f"{binding.module} has no {binding.name}")
            binding = module.bindings[binding.name]
        return binding

    def _module(self, name: str) -> list[Name]:
        """Take up a module with the definitions that run when it is imported."""
        if name in self.modules:
            return []
        needed = self.modules[name] = Needed(self.read(name))
        return [found for effect in needed.module.effects for found in self._definition(needed, effect)]

    def _definition(self, needed: Needed, definition: Definition) -> list[Name]:
        """Take up a definition; returns the names that it refers to."""
        if definition.start in needed.definitions:
            return []
        needed.definitions[definition.start] = definition
        module, found = needed.module, list[Name]()
        for name in definition.uses:
            if name in module.definitions:
                found.append((module.name, name))
            elif name in module.bindings:
                binding = needed.imported[name] = self.resolve(module.bindings[name])
                found += self._imported(binding, [a for of, a in definition.members if of == name], module)
        for node, _, _ in definition.imports:
            for name, binding in bindings_of(node, module.name):
                members = [attribute for of, attribute in definition.members if of == name]
                found += self._imported(self.resolve(binding), members, module)
        return found

    def _imported(self, binding: Binding, members: list[str], module: Module) -> list[Name]:
        """The names of the package that an import stands for."""
        if not binding.ours:
            top = binding.module.partition(".")[0]
            if top not in ALLOWED:
                raise CannotCarryCode(f"{module.path} imports {top}")
            return []
        if binding.name is not None:
            return [(binding.module, binding.name)]
        assert file_of(binding.module) is not None
        inner = [self.resolve(Binding(binding.module, name)) for name in members]
        return [*self._module(binding.module), *((b.module, b.name) for b in inner if b.ours and b.name is not None)]
