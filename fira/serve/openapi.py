"""The OpenAPI description of the server's operations."""
from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from fira import __version__
from fira.serve import api, schema

ERRORS = {"401": "The API key is missing or unknown",
          "404": "The named model is not the served one",
          "503": "The model is loading; see Retry-After"}
POST_ERRORS = {"400": "A field of the request is wrong", "413": "The body is too large",
               "415": "The body is not JSON", "429": "The queue is full; see Retry-After"}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk or an error in JSON; the last one is [DONE]"}}}
REF = "#/components/schemas/{model}"


def describe() -> dict[str, Any]:
    """The OpenAPI description of all operations."""
    types = [type for operation in api.OPERATIONS.values()
             for type in (operation.request, operation.response) if type]
    _, schemas = TypeAdapter.json_schemas([(type.__name__, "validation", TypeAdapter(type))
                                           for type in (*types, schema.Error)], ref_template=REF)
    return {"openapi": "3.1.0",
            "info": {"title": "FIRA", "version": __version__,
                     "description": "An OpenAI-compatible server of one FIRA model."},
            "security": [{}, {"key": []}],  # a key is required if the server was given --keys
            "paths": {path.replace(":path", ""): {
                "post" if operation.request else "get": _describe(path, operation)}
                for path, operation in api.OPERATIONS.items()},
            "components": {"schemas": schemas["$defs"], "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"}}}}


def _describe(path: str, operation: api.Operation) -> dict[str, Any]:
    errors = {**ERRORS, **(POST_ERRORS if operation.request else {})}
    content = _json(operation.response)
    if operation.function in (api.chat, api.complete, api.respond):
        content["text/event-stream"] = {"schema": EVENT}
    described: dict[str, Any] = {
        "summary": operation.summary, "operationId": operation.function.__name__,
        "responses": {"200": {"description": operation.summary, "content": content},
                      **{status: {"description": words, "content": _json(schema.Error)}
                         for status, words in errors.items()}}}
    if operation.request:
        described["requestBody"] = {"required": True, "content": _json(operation.request)}
    if "{model" in path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True,
                                    "schema": {"type": "string"}}]
    return described


def _json(model: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
