"""The API's own description (OpenAPI 3.1), generated from the route declarations."""

import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api import Kind, Route, Upload
from server.auth import Access
from server.errors import Code

_REFERENCE = "#/components/schemas/{model}"
_COMMON = (Code.MALFORMED, Code.INTERNAL, Code.UNAVAILABLE)
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "enum": [code.value for code in Code]},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def describe(routes: Sequence[Route], version: str) -> dict[str, Any]:
    """The OpenAPI document of every API operation and WebSocket."""
    described = [route for route in routes if route.kind is not Kind.PAGE]
    schemas, definitions = models_json_schema(
        sorted(_models(described), key=lambda pair: (pair[0].__name__, pair[1])), ref_template=_REFERENCE
    )
    components = definitions.get("$defs", {}) | {"Problem": _PROBLEM}
    paths: dict[str, dict[str, Any]] = {}
    for route in described:
        path = re.sub(r"{(\w+):[^}]*}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Cloudphone", "version": version},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "cloudphone"},
            },
        },
    }


def _models(routes: Sequence[Route]) -> set[tuple[type[BaseModel], Any]]:
    found: set[tuple[type[BaseModel], Any]] = set()
    for route in routes:
        if route.body:
            found.add((route.body, "validation"))
        if route.answer:
            found.add((route.answer, "serialization"))
    return found


def _operation(route: Route, schemas: Any) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "description": route.description,
        "tags": [route.tag],
        "parameters": _parameters(route),
        "responses": _responses(route, schemas),
        "security": [] if route.access is Access.PUBLIC else [{"bearer": []}, {"cookie": []}],
    }
    if route.body:
        schema = schemas[(route.body, "validation")]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif route.upload is Upload.FORM:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        form = {"type": "object", "required": ["file"], "properties": {"file": file}}
        operation["requestBody"] = {"required": True, "content": {route.upload.value: {"schema": form}}}
    elif route.upload is Upload.RAW:
        # Bytes that are no text have no schema.
        operation["requestBody"] = {"required": True, "content": {route.upload.value: {}}}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name, kind in route.path_types.items():
        schema: dict[str, Any] = {"type": "integer"} if kind is int else {"type": "string"}
        if kind is UUID:
            schema["format"] = "uuid"
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    if route.query:
        described = route.query.model_json_schema()
        for name, schema in described["properties"].items():
            required = name in described.get("required", ())
            parameters.append({"name": name, "in": "query", "required": required, "schema": schema})
    if route.creates:
        schema = {"type": "string", "maxLength": 255}
        parameters.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema})
    return parameters


def _responses(route: Route, schemas: Any) -> dict[str, Any]:
    success: dict[str, Any] = {"description": route.summary}
    if route.answer:
        schema = schemas[(route.answer, "serialization")]
        success["content"] = {"application/json": {"schema": schema}}
    elif route.media:
        success["content"] = {route.media: {}}
    if route.location:
        success["headers"] = {"Location": {"schema": {"type": "string"}}}
    responses = {str(route.status): success}
    by_status: dict[int, list[str]] = {}
    for code in _problems(route):
        by_status.setdefault(code.status, []).append(code.value)
    for status, codes in sorted(by_status.items()):
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        responses[str(status)] = {"description": ", ".join(sorted(codes)), "content": content}
    return responses


def _problems(route: Route) -> set[Code]:
    problems = {*_COMMON, *route.problems}
    if route.access is not Access.PUBLIC:
        problems |= {Code.NOT_SIGNED_IN, Code.INVALID_TOKEN, Code.CSRF}
    if route.access is Access.ADMIN:
        problems.add(Code.FORBIDDEN)
    if route.path_types:
        problems.add(Code.NOT_FOUND)
    if route.body or route.query:
        problems.add(Code.INVALID)
    if route.body:
        problems |= {Code.UNSUPPORTED_MEDIA_TYPE, Code.TOO_LARGE}
    if route.creates:
        problems |= {Code.IN_PROGRESS, Code.IDEMPOTENCY_MISMATCH}
    return problems


def by_tag(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The document's operations, regrouped for a page to read."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operation = {"method": method.upper(), "path": path, **operation}
            grouped.setdefault(operation["tags"][0], []).append(operation)
    return grouped
