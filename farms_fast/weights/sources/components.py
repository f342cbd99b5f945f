"""Pipelines of several models, each in a folder of its own, as diffusers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from farms_fast.weights.sources.indexes import read_json_object
from farms_fast.weights.sources.memory import HeaderSource
from farms_fast.weights.stacks import Skipped

PIPELINE_INDEX = "model_index.json"


class ComponentsSource(HeaderSource):
    """The tensors of several sources, with the component's name and a dot before each name."""

    def __init__(self, components: Mapping[str, HeaderSource], description: str) -> None:
        super().__init__(description)
        for component, source in components.items():
            prefix = f"{component}."
            for header in source.headers:
                identity = None if header.identity is None else (component, header.identity)
                name = prefix + header.name
                self.headers.append(replace(header, name=name, identity=identity))
                self._stored[name] = (source, header.name)
            self.skipped.extend(
                Skipped(prefix + tensor.name, tensor.shape, tensor.reason)
                for tensor in source.skipped
            )

    def _load(self, name: str, stored: tuple[HeaderSource, str]) -> Tensor:
        source, own_name = stored
        return source.load(own_name)


def component_folders(folder: Path) -> dict[str, Path]:
    """The folders of a pipeline's components, in the order of its index."""
    entries = read_json_object(folder / PIPELINE_INDEX)
    # The other entries are settings, and components of no folder, which are null.
    named = {
        name: folder / name
        for name in entries
        if not name.startswith("_")
        and not set(name) & set("/\\:\0")
        and name not in ("", ".", "..")
    }
    return {name: path for name, path in named.items() if path.is_dir()}
