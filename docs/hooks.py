"""What `mkdocs build` adds to the pages of this folder. Nothing here needs a network.

    build/docs/deit_fast        the package with kernels/ in it, as an installation has it: from
                                there come the API reference and the parsers
    <!-- cli reference -->      in a page: every command with its options, from the parsers
    <!-- results schema -->     in a page: the fields of a results file, from its JSON schema
    OF_ROOT                     files of the repository that are pages as well

A link to a file of the repository that is no page becomes the file's name.
"""

import argparse
import json
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "build/docs/deit_fast"
OF_ROOT = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmark-programs.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_startup(command, dirty):
    """Put the package together before mkdocstrings looks for its folder, at on_config."""
    shutil.rmtree(PACKAGE.parent, ignore_errors=True)
    for folder, into in (("deit_fast", PACKAGE), ("kernels", PACKAGE / "kernels")):
        for file in (ROOT / folder).rglob("*"):  # which follows no links
            if file.is_file() and "__pycache__" not in file.parts:
                link = into / file.relative_to(ROOT / folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)


def on_files(files, config):
    """Add the pages that lie outside this folder."""
    for source, page in OF_ROOT.items():
        if (ROOT / source).exists():
            content = relink((ROOT / source).read_text(), source, page)
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what is generated, and mend the links that leave this folder."""
    if "<!-- cli reference -->" in markdown:
        markdown = markdown.replace("<!-- cli reference -->", cli_reference())
    if "<!-- results schema -->" in markdown:
        markdown = markdown.replace("<!-- results schema -->", results_schema())
    uri = page.file.src_uri
    return markdown if uri in OF_ROOT.values() else relink(markdown, f"docs/{uri}", uri)


def relink(markdown: str, source: str, page: str) -> str:
    """Links relative to `source`, a path in the repository, as links of `page` of the site."""

    def link(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        elif path in OF_ROOT:
            uri = OF_ROOT[path]
        elif path == "README.md":
            uri = "index.md"
        elif (ROOT / path).exists():
            return text if "`" in text else f"`{path}`"
        else:
            return match[0]  # MkDocs says that it is broken
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def cli_reference() -> str:
    """Every command of `deit-fast`, as Markdown."""
    os.environ["COLUMNS"] = "100"  # not this terminal's
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        from deit_fast.cli import build_parser
    finally:
        sys.path.remove(str(PACKAGE.parent))
    return "\n".join(_commands(build_parser(), 2))


def _commands(parser, level):
    """A section for each command below `parser`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                if name in summaries:  # the others are hidden, or other names of these
                    yield from _command(command, level)


def _command(parser, level):
    yield f"\n{'#' * level} {parser.prog}\n"
    if parser.description:
        yield _escape(" ".join(parser.description.split())) + "\n"
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    yield f"```text\n{usage}\n```\n"
    options = [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
    ]
    if options:
        yield "| argument | |\n|---|---|"
        for action in options:
            yield f"| {_name(action)} | {_help(parser, action)} |"
    if parser.epilog:
        yield f"\n```text\n{parser.epilog.strip()}\n```\n"
    yield from _commands(parser, level + 1)


def _name(action):
    takes = (
        ""
        if action.nargs == 0
        else " "
        + argparse.HelpFormatter("")._format_args(
            action, str(action.metavar or action.dest.upper())
        )
    )
    if action.choices and not action.metavar:
        takes = " {" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{takes.strip()}`".replace("|", "\\|")
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings).replace("|", "\\|")


def _help(parser, action):
    values = {**vars(action), "prog": parser.prog}
    if action.choices:
        values["choices"] = ", ".join(map(str, action.choices))
    text = _escape(" ".join(((action.help or "") % values).split()))
    return f"required; {text}".rstrip("; ") if action.required and action.option_strings else text


def _escape(text):
    return re.sub(r"([|*_<>\[\]])", r"\\\1", text)


def results_schema() -> str:
    """The fields of a results file, a table for each object of the schema."""
    schema = json.loads((ROOT / "benchmarks/results.schema.json").read_text())
    return "\n".join(_object("The file", schema, schema))


def _object(title, node, schema):
    parts = [node, *(schema["$defs"][ref] for ref in _refs(node.get("allOf", ())))]
    yield f"\n## {title}\n\n| field | type | required |\n|---|---|---|"
    below = []
    for part in parts:
        required = part.get("required", ())
        for name, field in part.get("properties", {}).items():
            yield f"| `{name}` | {_type(field)} | {'yes' if name in required else ''} |"
            if field.get("type") == "object" and "properties" in field:
                below.append((f"`{name}`", field))
    for name, field in below:
        yield from _object(name, field, schema)
    if title == "The file":
        for name, part in schema["$defs"].items():
            if "properties" in part:
                yield from _object(name.replace("_", " ").capitalize(), part, schema)


def _refs(nodes):
    return [node["$ref"].rsplit("/", 1)[1] for node in nodes if "$ref" in node]


def _type(field):
    if "$ref" in field:
        return f"*{field['$ref'].rsplit('/', 1)[1]}*"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "oneOf" in field or "anyOf" in field:
        return " or ".join(map(_type, field.get("oneOf", field.get("anyOf"))))
    kind = field.get("type", "any")
    text = " or ".join(kind) if isinstance(kind, list) else kind
    if kind == "array":
        text += f" of {_type(field.get('items', {}))}"
    if "pattern" in field:
        text += f", `{field['pattern']}`".replace("|", "\\|")
    return text
