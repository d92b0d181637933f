"""What columns may be: those of the output, and which types of the input can be used.

Extension types are refused in every column that is read, save the few that Arrow itself defines and that carry no
code: some others (`arrow.py_extension_type`) hold a pickle, and to unpickle is to run what the file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ray_ministral.errors import InputError

_OUTPUT_FIELDS = (
    pa.field("source_file", pa.string()),
    pa.field("source_row_group", pa.int32()),
    pa.field("source_row", pa.int64()),
    pa.field("caption", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("image_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("attempts", pa.int32()),
)
_TOKEN_IDS_FIELD = pa.field("token_ids", pa.list_(pa.int32()))

_CANONICAL_EXTENSIONS = frozenset(
    {
        "arrow.uuid",
        "arrow.json",
        "arrow.bool8",
        "arrow.opaque",
        "arrow.fixed_shape_tensor",
        "arrow.variable_shape_tensor",
    }
)

IMAGE_TYPES = "binary, a struct with a binary field `bytes`, or a list of either"
TEXT_TYPES = "text, a number, a truth value or a date"
MESSAGES_TYPES = "a list of structs {role, content}, or text with such a list as JSON"


@dataclass(frozen=True)
class RowColumns:
    """Which columns of a row are read: its images, its prompt's values, what is learnt from it, its own limit."""

    image: str
    texts: tuple[str, ...] = ()
    response: str | None = None
    messages: str | None = None
    limit: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        found = (self.image, *self.values, self.messages)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    @property
    def values(self) -> tuple[str, ...]:
        """Those that hold single values."""
        found = (*self.texts, self.response, self.limit)
        return tuple(dict.fromkeys(name for name in found if name is not None))


def output_fields(*, with_token_ids: bool) -> tuple[pa.Field, ...]:
    """The output's own columns, in order, after the carried ones."""
    return (*_OUTPUT_FIELDS, _TOKEN_IDS_FIELD) if with_token_ids else _OUTPUT_FIELDS


def output_columns(*, with_token_ids: bool) -> tuple[str, ...]:
    """The names of `output_fields`."""
    return tuple(field.name for field in output_fields(with_token_ids=with_token_ids))


def plain_columns(carried: Sequence[str], without: Sequence[str]) -> str:
    """What to type to carry over `carried` but `without`."""
    left = [name for name in carried if name not in without]
    return " ".join(f"--columns {name}" for name in left) or "--columns with a column of another name"


def check_columns(file: str, schema: pa.Schema, columns: RowColumns, *, carried: Sequence[str] = ()) -> None:
    """Refuses a file whose columns cannot be used: missing, doubled, of a wrong type, or an extension.

    `columns` are those that are read, `carried` those that are carried over.
    Raises InputError, with the column, its type, what is wanted and what is there.
    """
    for option, names in (
        ("--image-column", [columns.image]),
        ("the prompt", columns.texts),
        ("--response-column", [columns.response] if columns.response is not None else []),
        ("--messages-column", [columns.messages] if columns.messages is not None else []),
        ("--max-new-tokens-column", [columns.limit] if columns.limit is not None else []),
        ("--columns", carried),
    ):
        for name in names:
            count = schema.names.count(name)
            if count == 0:
                raise InputError(
                    f"{file} has no column {name!r}, which {option} needs; it has {', '.join(map(repr, schema.names))}"
                )
            if count > 1:
                raise InputError(f"{file} has {count} columns called {name!r}: rename them, so that one can be chosen")
            _refuse_extensions(file, schema.field(name))
    image, messages = columns.image, columns.messages
    if not is_image(schema.field(image).type):
        raise InputError(
            f"{file}: column {image!r} is of type {schema.field(image).type}, which holds no images; wanted "
            f"{IMAGE_TYPES}: choose another with --image-column; there is {_described(schema)}"
        )
    for name in columns.values:
        if not is_text(schema.field(name).type):
            raise InputError(
                f"{file}: column {name!r} is of type {schema.field(name).type}, which cannot stand in a prompt; wanted "
                f"{TEXT_TYPES}: choose another; there is {_described(schema)}"
            )
    if columns.limit is not None and not pa.types.is_integer(schema.field(columns.limit).type):
        raise InputError(
            f"{file}: column {columns.limit!r} is of type {schema.field(columns.limit).type}, wanted whole numbers: "
            f"choose another with --max-new-tokens-column; there is {_described(schema)}"
        )
    if messages is not None and not is_messages(schema.field(messages).type):
        raise InputError(
            f"{file}: column {messages!r} is of type {schema.field(messages).type}, which holds no conversation; "
            f"wanted {MESSAGES_TYPES}: choose another with --messages-column; there is {_described(schema)}"
        )


def is_image(type_: pa.DataType) -> bool:
    """Whether a column of this type can be the image column."""
    if is_list(type_):
        return _is_one_image(type_.value_type)
    return _is_one_image(type_)


def is_list(type_: pa.DataType) -> bool:
    """Whether it is any of Arrow's lists."""
    types = pa.types
    return bool(types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_))


def is_binary(type_: pa.DataType) -> bool:
    """Whether it is any of Arrow's binaries of variable length."""
    types = pa.types
    return bool(types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_))


def is_text(type_: pa.DataType) -> bool:
    """Whether a column of this type can stand in a prompt."""
    types = pa.types
    if types.is_dictionary(type_):
        return is_text(type_.value_type)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
        types.is_date,
        types.is_null,
    )
    return any(test(type_) for test in tests)


def is_string(type_: pa.DataType) -> bool:
    """Whether it is any of Arrow's texts, or a dictionary of them."""
    types = pa.types
    if types.is_dictionary(type_):
        return is_string(type_.value_type)
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def is_messages(type_: pa.DataType) -> bool:
    """Whether a column of this type can hold conversations. What is in them is checked row by row."""
    if is_list(type_):
        item = type_.value_type
        names = {field.name for field in item} if pa.types.is_struct(item) else set()
        return {"role", "content"} <= names
    return is_string(type_)


def _is_one_image(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return is_binary(type_.value_type)
    if pa.types.is_struct(type_):
        return any(field.name == "bytes" and is_binary(field.type) for field in type_)
    # a column in which every value is null has no other type; each of its rows then becomes a bad_image
    return is_binary(type_) or bool(pa.types.is_null(type_))


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name!r} ({field.type})" for field in schema)


def _refuse_extensions(file: str, field: pa.Field) -> None:
    for extension in _extensions(field):
        if extension not in _CANONICAL_EXTENSIONS:
            raise InputError(
                f"{file}: column {field.name!r} holds the extension type {extension!r}, which may need code from the "
                "file to be read; wanted plain Arrow types: leave it out by naming the others with --columns, or write "
                "it as its storage type"
            )


def _extensions(field: pa.Field) -> Iterator[str]:
    """The names of the extension types in a field, to any depth."""
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    if name is not None:  # a type that nobody registered here: pyarrow shows its storage and leaves the name beside it
        yield name.decode("utf-8", "replace")
    type_ = field.type
    if isinstance(type_, pa.BaseExtensionType):
        yield type_.extension_name
        type_ = type_.storage_type
    if pa.types.is_dictionary(type_):
        yield from _extensions(pa.field(field.name, type_.value_type))
    for index in range(type_.num_fields):
        yield from _extensions(type_.field(index))
