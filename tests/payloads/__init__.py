"""Task types as JSON: what can't be stored, and which changes of a type break queued tasks."""
