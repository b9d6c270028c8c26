"""Reference pages, generated from registries, docstrings and recipes: one page per member and one index per kind."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from docs_site import recipes
from docs_site.docstrings import HIDE_CONTENTS, Docstring, cell, escape, module_docstring, own_docstring, parse, table
from docs_site.kinds import KINDS, Kind
from tpcompress.families import Family
from tpcompress.families import catalogue as family_catalogue
from tpcompress.pruners import Pruner, TokenView
from tpcompress.pruners import catalogue as pruner_catalogue
from tpcompress.pruners.views import VIEWS, fields_of

ROOT = Path(__file__).resolve().parents[2]

FACTS = {
    "site": "Stage layers",
    "reads": "Reads",
    "asks": "Reads the prompt",
    "grad": "Gradient",
    "merges": "Merges",
    "exact": "Exact count",
    "serving": "Servable",
    "paper": "Paper",
}
"""Column titles for the entries of `pruner_catalogue.facts`."""


def pages() -> dict[str, str]:
    """Markdown of every reference page by its path below the root of the site."""
    found = {}
    for kind in KINDS:
        members = kind.members()
        found[f"reference/{kind.many}/index.md"] = _index(kind)
        for name, member in members.items():
            found[f"reference/{kind.many}/{name}.md"] = _page(kind, name, member)
    return found | {"reference/views/index.md": _views()} | dict(recipes.pages())


def summary(member: Any) -> str:
    """One sentence about a member of a kind, as plain text."""
    if isinstance(member, Family):
        return _without_name(family_catalogue.describe(member).summary)
    if issubclass(member, Pruner):
        return _sentence(pruner_catalogue.retains(member))
    line = module_docstring(member).partition("\n\n")[0].replace("\n", " ")
    own = own_docstring(member).partition("\n\n")[0].replace("\n", " ")
    several = sum(1 for each in vars(inspect.getmodule(member)).values() if _defined_with(each, member)) > 1
    if several or not line:
        return _sentence(own)
    title, _, rest = line.partition(": ")
    same = re.sub(r"\W", "", title).lower() == re.sub(r"[\W_]", "", member.__name__).lower()
    return _sentence(rest if same and rest else line)


def _defined_with(other: Any, member: type) -> bool:
    base = member.__mro__[-2] if len(member.__mro__) > 2 else object
    return inspect.isclass(other) and other.__module__ == member.__module__ and issubclass(other, base)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "." if text else ""


def _without_name(line: str) -> str:
    return _sentence(line.partition(": ")[2] or line)


def _index(kind: Kind) -> str:
    """The table of a kind, its adding guide, and for families what is refused."""
    members = kind.members()
    lines = [HIDE_CONTENTS, f"# {kind.many.capitalize()}\n", kind.about]
    lines.append(f"\nEach is one file in `{kind.folder}/`; see [adding a {kind.one}](../../adding/{kind.one}.md).\n")
    facts = {name: _facts(member) for name, member in members.items()}
    columns = [kind.one.capitalize(), "What it does", *next(iter(facts.values()))]
    for title, names in _groups(kind).items():
        rows = [
            [f"[`{name}`]({name}.md)", cell(summary(members[name])), *map(cell, facts[name].values())] for name in names
        ]
        lines.append((f"## {title.capitalize()}\n\n" if title else "") + table(columns, rows))
    if kind.one == "pruner":
        lines.append(_PRUNER_COLUMNS)
    if kind.one == "family":
        lines.append("## Known limits\n")
        limits = [(name, limit) for name, family in members.items() for limit in family.limits]
        lines.append(_reasons(family_catalogue.by_reason(limits)))
        lines.append("## Refused model types\n")
        lines.append(_reasons(family_catalogue.refusals()))
    return "\n".join(lines)


def _groups(kind: Kind) -> dict[str, list[str]]:
    """Members by heading; one heading without a title for all kinds but pruners."""
    return pruner_catalogue.groups() if kind.one == "pruner" else {"": list(kind.members())}


_PRUNER_COLUMNS = """
Stage layers: layers at which a stage with this pruner may act (0 is before the language model). Gradient: `learns` has
weights of its own, `yes` lets a gradient reach its scores. Servable: `A` can be applied by a serving engine before the
language model, with a count that is known from the image and without the prompt.
"""


def _reasons(reasons: dict[str, list[str]]) -> str:
    return "".join(f"- {', '.join(f'`{name}`' for name in names)}: {escape(why)}\n" for why, names in reasons.items())


def _facts(member: Any) -> dict[str, str]:
    if isinstance(member, Family):
        return {"Model types": ", ".join(member.model_types)} | {
            word.capitalize(): text for word, text in family_catalogue.facts(member).items()
        }
    if issubclass(member, Pruner):
        found = pruner_catalogue.facts(member())
        return {FACTS.get(word, word): text for word, text in found.items() if word != "paper"}
    return {}


def _page(kind: Kind, name: str, member: Any) -> str:
    if isinstance(member, Family):
        return _family_page(member)
    file = Path(inspect.getfile(member)).resolve()
    lines = [f"# {name}\n", f"*{kind.one.capitalize()}* · `{file.relative_to(ROOT)}`\n"]
    text, own = parse(module_docstring(member)), parse(own_docstring(member))
    lines += [text.body, "\n", own.body, "\n"]
    if issubclass(member, Pruner):
        lines.append(_pruner_facts(member))
    lines.append("\n" + _usage(kind, name, member))
    lines.append(_arguments(member, own))
    if own.sections.get("Raises"):
        lines.append("\n## Errors\n")
        lines += [f"- `{error}`: {escape(reason)}" for error, reason in own.sections["Raises"].items()]
    if issubclass(member, Pruner):
        for plan, text in pruner_catalogue.plans_of(member).items():
            lines.append(f"\n## {plan}:paper\n\nThe settings of the paper, wherever a plan is read (`{plan}:paper`):\n")
            lines.append(f"```yaml\n{text}```")
    used = recipes.used_in(kind, name)
    if used:
        lines.append("\n## Recipes that use it\n")
        lines += [f"- [`{path}`](../recipes/{recipes.file_name(path)})" for path in used]
    return "\n".join(lines) + "\n"


def _pruner_facts(cls: type[Pruner]) -> str:
    found = pruner_catalogue.facts(cls())
    paper = found.get("paper", "")
    rows = [[FACTS.get(word, word), cell(text)] for word, text in found.items() if word != "paper"]
    if paper:
        rows.append(["Paper", escape(paper) if paper == "ours" else f"arXiv {escape(paper)}"])
    why = pruner_catalogue.unserved(cls())
    if why is not None:
        rows.append(["Not servable because", cell(why)])
    return "\n" + table(["Property", "Value"], rows)


def _usage(kind: Kind, name: str, member: Any) -> str:
    if kind.one == "pruner":
        budget = "keep_tokens: 0" if member().keeps_none else "keep_ratio: 0.25"
        layer = 1 if pruner_catalogue.site(member()).endswith("1") else 0
        return f"In a plan:\n\n```yaml\nstages:\n  - {{pruner: {name}, layer: {layer}, {budget}}}\n```\n"
    if kind.one in ("scorer", "selector", "applier"):
        line = f"pruner: {{type: learned_gate, {kind.one}: {name}}}"
        return f"In a plan:\n\n```yaml\nstages:\n  - {{{line}, keep_ratio: 0.25}}\n```\n"
    if kind.one in ("task", "metric"):
        values = [f"{argument}: ..." for argument, default in signature(member).items() if default == "required"]
        value = f"{{type: {name}, {', '.join(values)}}}" if values else name
        return f"In a comparison file:\n\n```yaml\n{kind.one}: {value}\n```\n"
    keys = {"loss": f"losses: [{name}]", "teacher": f"teacher: {name}", "schedule": f"schedule: {name}"}
    arguments = [argument for argument, default in signature(member).items() if default == "required"]
    if arguments:
        init = ", ".join(f"{argument}: ..." for argument in arguments)
        named = f"{{class_path: {name}, init_args: {{{init}}}}}"
        keys = {"loss": f"losses: [{named}]", "teacher": f"teacher: {named}", "schedule": f"schedule: {named}"}
    return f"In a recipe:\n\n```yaml\nmodel:\n  {keys[kind.one]}\n```\n"


def signature(cls: type) -> dict[str, str]:
    """Arguments by name with their defaults as YAML writes them, or `required`."""
    found = {}
    if cls.__init__ is object.__init__:
        return found
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found[name] = "required" if parameter.default is parameter.empty else _yaml(parameter.default)
    return found


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n").removesuffix("\n...")


def _arguments(cls: type, own: Docstring) -> str:
    known = signature(cls)
    if not known:
        return "\nIt has no arguments.\n"
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        told |= parse(own_docstring(base)).sections.get("Args", {})
    rows = [[f"`{name}`", f"`{default}`", escape(told.get(name, ""))] for name, default in known.items()]
    return "\n## Arguments\n\n" + table(["Argument", "Default", "Meaning"], rows)


def _family_page(family: Family) -> str:
    about = family_catalogue.describe(family)
    lines = [f"# {about.name}\n", f"*Family* · `tpcompress/families/{about.file}`\n", escape(about.text), "\n"]
    rows = [[escape(what.capitalize()), cell(words)] for what, words in about.details.items()]
    lines.append(table(["Property", "Value"], rows))
    lines.append("## Known limits\n")
    lines += [f"- {escape(limit)}" for limit in about.limits] or ["None known."]
    return "\n".join(lines) + "\n"


def family_fields() -> str:
    """The table of the fields of `Family`."""
    rows = [
        [f"`{field.name}`", "required" if field.default is None else f"`{field.default}`", cell(field.text)]
        for field in family_catalogue.field_docs()
    ]
    return table(["Field", "Default", "Meaning"], rows)


def _views() -> str:
    """The table of everything that a pruner may read."""
    texts = family_catalogue.attribute_docs(TokenView)
    rows = []
    for name, spec in sorted(VIEWS.items()):
        meanings = [f"`{field}`: {cell(texts[field])}" for field in fields_of(name) if field in texts]
        rows.append([f"`{name}`", f"`{spec.at}`", "yes" if spec.prompt else "-", "<br>".join(meanings)])
    always = [[f"`{name}`", cell(text)] for name, text in texts.items() if not any(name in fields_of(v) for v in VIEWS)]
    return "\n".join(
        [
            HIDE_CONTENTS,
            "# Views\n",
            "A view is what a pruner may read beside the tokens themselves, by its name in `needs`. Adding one is",
            "one file and one field: see [adding a view](../../adding/view.md).\n",
            table(["View", "From", "Prompt", "Fields of `TokenView`"], rows),
            "## Fields without a view\n",
            table(["Field", "Meaning"], always),
        ]
    )
