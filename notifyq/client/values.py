"""The value of a result: its JSON, decoded as the type that the caller names or the handler is annotated to return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from ..errors import NotifyqError
from ..signature import innermost

if TYPE_CHECKING:
    from ..registry import Handler, Registry


def decode_result(registry: Registry, id: int, task_type: str, result: bytes | None, wanted: Any) -> Any:
    """The result of a done task.

    task_type  the column `type` of the task
    result     its JSON; None: the handler returned None
    wanted     its type; None: what the app's handler of the task is annotated to return, or plain JSON without one

    Raises NotifyqError for a result that isn't of the wanted type.
    """
    text = b"null" if result is None else result
    if wanted is None:
        handler = registry.get(task_type)
        return msgspec.json.decode(text) if handler is None else decode_by_handler(handler, text)
    try:
        return msgspec.json.decode(text, type=wanted)
    except msgspec.ValidationError as error:
        raise NotifyqError(f"the result of task {id} ({task_type}) isn't of the wanted type: {error}") from None


def decode_by_handler(handler: Handler, result: bytes) -> Any:
    """The result as the type that the handler is annotated to return; plain JSON without one, or if it doesn't fit."""
    try:
        annotation: Any = get_type_hints(innermost(handler.function)).get("return", Any)
        if handler.batch is not None:
            lists = [choice for choice in (annotation, *get_args(annotation)) if get_origin(choice) in (list, tuple)]
            annotation = get_args(lists[0])[0] if lists else Any
        every: tuple[Any, ...] = get_args(annotation)
        some = tuple(choice for choice in every if not _is_error(choice))
        if len(some) < len(every):
            annotation = Union[some]  # noqa: UP007 - built at run time
        return msgspec.json.decode(result, type=annotation)
    except Exception:  # evaluating an annotation may raise anything; or the result doesn't fit
        return msgspec.json.decode(result)


def _is_error(choice: Any) -> bool:
    """Whether a member of a union is an error, such as Retry: a handler may return one, but it is no result."""
    return isinstance(choice, type) and issubclass(choice, BaseException)
