"""Writes docs/rest.md from the OpenAPI document of a service: `python -m tests.docs.rest_reference`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.services.live import make_context, serving

PAGE = Path(__file__).parents[2] / "docs/rest.md"
HEAD = """# REST reference

Generated from the service's own OpenAPI document (`GET /openapi.json`) by `python -m tests.docs.rest_reference`; a test
holds it against the service. Bodies are JSON or `application/msgpack`, by `Content-Type` and `Accept`, with one schema:
arrays are lists in JSON and raw little-endian bytes (int32, float32, one byte per bool) in msgpack. An error is
`{error, detail, hint}` with an honest status. [Submit from your agent](submitting.md) shows the calls in use,
[security](security.md) the roles.

"""

Schema = dict[str, Any]


def reference(openapi: Schema) -> str:
    """Return the page."""
    operations = [
        _operation(method.upper(), path, operation, openapi)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    records = [record_of(name, schema) for name, schema in sorted(openapi["components"]["schemas"].items())]
    return HEAD + "\n".join(operations) + "\n## Records\n\n" + "\n".join(records)


def openapi_of_a_service() -> Schema:
    """Return the document of a real service."""
    with tempfile.TemporaryDirectory() as directory, serving(make_context(Path(directory))) as url:
        document: Schema = httpx.get(f"{url}/openapi.json").json()
    return document


def _operation(method: str, path: str, operation: Schema, openapi: Schema) -> str:
    said: str = operation.get("description") or operation.get("summary") or ""
    lines = [f"## {method} {path}", "", " ".join(said.split()), ""]
    parameters = operation.get("parameters", [])
    if parameters:
        lines += ["| parameter | in | type | |", "|---|---|---|---|"]
        lines += [
            f"| `{p['name']}` | {p['in']} | {type_of(p['schema'])} | {'required' if p.get('required') else ''} |"
            for p in parameters
        ]
        lines.append("")
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        lines += [f"Body: {_either(bodies)}, as {' or '.join(f'`{media_type}`' for media_type in bodies)}", ""]
    lines += ["| status | body | |", "|---|---|---|"]
    for status, answer in sorted(operation["responses"].items()):
        lines.append(f"| {status} | {_either(answer.get('content', {}))} | {' '.join(answer['description'].split())} |")
    return "\n".join(lines) + "\n"


def _either(content: Schema) -> str:
    return " or ".join(dict.fromkeys(type_of(body.get("schema", {})) for body in content.values()))


def record_of(name: str, schema: Schema) -> str:
    """Return the section of one record."""
    lines = [f"### {name}", ""]
    if description := schema.get("description"):
        lines += [" ".join(description.split()), ""]
    if "enum" in schema:
        return "\n".join([*lines, ", ".join(f"`{value}`" for value in schema["enum"])]) + "\n"
    required = set(schema.get("required", ()))
    fields = list(schema.get("properties", {}).items())
    if not fields:
        return "\n".join([*lines, type_of(schema)]) + "\n"
    lines += ["| field | type | |", "|---|---|---|"]
    lines += [f"| `{field}` | {type_of(of)} | {_note(of, field in required)} |" for field, of in fields]
    return "\n".join(lines) + "\n"


def _note(schema: Schema, required: bool) -> str:
    text = text_of(schema)
    default = "required" if required else f"default `{schema['default']}`" if "default" in schema else "optional"
    return f"{default}. {text}" if text else default


def text_of(schema: Schema) -> str:
    """Return what a schema says of itself, fit for a cell of a table."""
    return " ".join(str(schema.get("description", "")).split()).replace("|", "\\|")


def type_of(schema: Schema) -> str:
    """Return the type of a schema with its bounds, fit for a cell of a table."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(type_of(part) for part in schema[union]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(map(type_of, schema['prefixItems']))}"
    if kind == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return " ".join([str(schema.get("format", kind)), *_bounds(schema)])


def _bounds(schema: Schema) -> Iterator[str]:
    for name, sign in {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}.items():
        if name in schema:
            yield f"{sign} {schema[name]}"
    if "pattern" in schema:
        yield "`" + schema["pattern"].replace("|", "\\|") + "`"


if __name__ == "__main__":
    PAGE.write_text(reference(openapi_of_a_service()))
