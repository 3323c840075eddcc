"""Search in a table of embeddings: the rows that are nearest to a file, and pictures of them.

bridle search X.parquet FILE
"""

import os
from pathlib import Path
from typing import Any

import torch

from bridle_hf.common.errors import ArgumentError
from bridle_hf.common.files import write_figure
from bridle_hf.data.modalities import load_processor, make_sample_loader
from bridle_hf.data.sample import Sample
from bridle_hf.embedding.arguments import SearchArguments
from bridle_hf.embedding.embed import read_layers
from bridle_hf.embedding.embedder import Embedder
from bridle_hf.embedding.tables import read_table
from bridle_hf.patching_bridle import INPUT_NAMES
from bridle_hf.visualization_bridle import plot_inputs


class Neighbours:
    """The rows of a table by their nearness to a file: the cosine of their embeddings.

    Args:
        table: what `bridle embed` wrote: .parquet or .npz, of level clip.
        model: the model that it was made by, where that is no more where it was.

    Raises:
        ValueError: it is no such table, or not of clips; the model is not there, or not the one.
        OSError: the table cannot be read.
    """

    def __init__(self, table: str, model: str | None = None):
        found = read_table(Path(table))
        self.table, self.made, self.columns = table, found.made, found.columns
        if self.made["level"] != "clip":
            raise ValueError(f"{table} has a row for each {self.made['level']}: make one of level clip to search in")
        self.model = model or self.made["model"]
        self.layers = read_layers(self.made["layers"])
        options = {name: self.made[name] for name in ("overlap", "stride")}
        self.embedder = Embedder.from_pretrained(self.model, **options)
        shape = self.embedder.shape(layers=self.layers, pooling=self.made["pooling"])
        if shape != found.values.shape[1:]:
            raise ValueError(f"{table} has embeddings {found.values.shape[1:]}, the model gives {shape}")
        # Tables of before do not say.
        if "weights" in self.made and self.made["weights"] != self.embedder.hash_of_weights():
            raise ValueError(f"{table} was made by other weights than those of {self.model}: make it anew")
        self._rows = torch.from_numpy(found.values).flatten(1)

    def find(self, file: str, top_k: int) -> list[dict[str, Any]]:
        """The nearest rows, in order: `similarity`, and the table's columns.

        Raises:
            ValueError: the file cannot be read.
        """
        query = self.embedder.embed(file, layers=self.layers, pooling=self.made["pooling"])
        similarities = torch.nn.functional.cosine_similarity(self._rows, torch.from_numpy(query).flatten()[None])
        best = similarities.topk(min(top_k, len(self._rows))).indices.tolist()
        columns = {"similarity": similarities.numpy(), **self.columns}
        return [{name: column[row].item() for name, column in columns.items()} for row in best]

    def draw(self, file: str, rows: list[dict[str, Any]]) -> Any:
        """A picture of the file and of these rows.

        Raises:
            ValueError, OSError: a file of them is no more where it was, or cannot be read.
        """
        config = self.embedder.config
        processor = load_processor(self.model, config)
        load = make_sample_loader(config, processor)
        names = [(file, "the file itself")]
        for row in rows:
            label = row.get("label") or row.get("labels")
            data = self.made["data"] if os.path.isdir(self.made["data"]) else ""  # of a list, ids are whole paths
            names.append((os.path.join(data, row["id"]), f"{row['similarity']:.3f}  {row['id'][-24:]}"
                          + (f"\n{label}" if label else "")))  # fmt: skip
        inputs = []
        for path, _ in names:
            loaded = load(Sample(path))
            values = loaded[INPUT_NAMES[config.modality]]
            inputs.append(values[: int(loaded["attention_mask"].sum())] if "attention_mask" in loaded else values)
        rate = {"sampling_rate": processor.sampling_rate} if config.modality == "audio" else {}
        title = f"{os.path.basename(file)} and its nearest neighbours, by cosine similarity"
        return plot_inputs(inputs, [name for _, name in names], config, title=title, **rate)


def search(args: SearchArguments) -> list[dict[str, Any]]:
    """[`Neighbours.find`]; with a picture, if asked for.

    Raises:
        ArgumentError: the table or the file cannot be read; the table is not of clips; a neighbour that is to be drawn
            is no file.
    """
    try:
        neighbours = Neighbours(args.table, args.model)
        rows = neighbours.find(args.file, args.top_k)
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    if args.picture:
        try:
            write_figure(Path(args.picture), neighbours.draw(args.file, rows))
        except (ValueError, OSError, ImportError) as error:
            raise ArgumentError(f"--picture: {error}") from error
    return rows


def search_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What [`search`] returns, as a table to print."""
    names = [name for name in rows[0] if name != "similarity"]
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    lines = [f"{'similarity':>10}  " + "  ".join(f"{name:<{widths[name]}}" for name in names)]
    for row in rows:
        lines.append(f"{row['similarity']:10.4f}  " + "  ".join(f"{row[name]!s:<{widths[name]}}" for name in names))
    return [line.rstrip() for line in lines]
