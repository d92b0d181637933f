"""Fixtures of the ladder: the small models, made once and saved once; nobody may change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from tests.parity.small_models import DEFAULT_ROPE, YARN, save_directory, small_config, small_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> None:
    """Products are summed in one order only with a fixed number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def reference() -> Callable[..., Mistral3ForConditionalGeneration]:
    """Hugging Face's model: `reference(tied=False, rope="yarn", layers=4)`. Shared, so leave it as it is."""
    made: dict[Any, Mistral3ForConditionalGeneration] = {}

    def get(*, tied: bool = False, rope: str = "yarn", layers: int = 4) -> Mistral3ForConditionalGeneration:
        key = (tied, rope, layers)
        if key not in made:
            parameters = {"yarn": YARN, "default": DEFAULT_ROPE}[rope]
            made[key] = small_model(small_config(tied=tied, rope=parameters, layers=layers))
        return made[key]

    return get


@pytest.fixture(scope="package")
def directory(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The saved directory of `reference(...)` with the same arguments. Shared: copy it before you change a file."""
    made: dict[Any, Path] = {}

    def get(**arguments: Any) -> Path:
        key = tuple(sorted(arguments.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "model"
            made[key] = save_directory(reference(**arguments), folder)
        return made[key]

    return get
