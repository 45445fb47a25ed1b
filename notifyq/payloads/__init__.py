"""Payloads as JSON: what a type can hold (jsonable), its JSON Schema (document), what a change breaks (compatible)."""
