"""The page of `bridle demo --serve DIR`: a file in, what the models tell of it out; by gradio, on this machine alone.

bridle demo --serve OUT --embeddings X.parquet
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from bridle_hf.common.errors import ArgumentError, one_line
from bridle_hf.data.modalities import MODALITIES
from bridle_hf.demos.arguments import DemoArguments
from bridle_hf.demos.showcase import Findings, Showcase


logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CACHE_SECONDS = 3600  # of what was uploaded and drawn


def serve(args: DemoArguments) -> Iterator[str]:
    """The page, until it is interrupted; yields what it tells, in lines.

    Raises:
        ArgumentError: gradio is not installed; no model is there, or a table that cannot be used; the port is taken.
    """
    try:
        page = make_page(Showcase(args.serve, args.embeddings), args.serve)
        _, url, _ = page.launch(
            server_name=HOST, server_port=args.port, share=False, ssr_mode=False, prevent_thread_lock=True, quiet=True,
            theme=_theme(), footer_links=[],
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    yield f"{url} shows {args.serve}; Ctrl-C ends it"
    page.block_thread()


def make_page(showcase: Showcase, folder: str) -> Any:
    """A `gradio.Blocks` with an input of the models' modality, and what they can tell of one.

    Raises:
        ArgumentError: gradio is not installed.
    """
    gradio = _gradio()
    name = Path(folder).resolve().name
    with gradio.Blocks(title=f"{name}: BRIDLE", analytics_enabled=False, delete_cache=(CACHE_SECONDS,) * 2) as page:
        gradio.Markdown(_introduction(showcase, name))
        with gradio.Row():
            with gradio.Column(scale=1, min_width=340):
                file = _input(gradio, showcase.config.modality)
                outputs = [gradio.Markdown(elem_id="said")]
                options = {"interactive": False, "visible": False, "show_label": False}
                if showcase.classify:
                    outputs.append(gradio.Label(elem_id="classes", num_top_classes=5, visible=False, show_label=False))
                if showcase.neighbours:
                    outputs.append(gradio.Dataframe(elem_id="rows", wrap=True, **options))
            with gradio.Column(scale=2, min_width=480):
                # Without labels: they would hide the titles of the pictures.
                options |= {"type": "pil", "format": "png", "buttons": ["download"]}
                outputs += [gradio.Image(elem_id=name, alt_text=name, **options) for name in showcase.pictures]

        def shown(path: str | None) -> list[Any]:
            """What is not there is not shown, either."""
            return [gradio.update(value=value, visible=bool(value)) for value in answer(showcase, path)]

        file.change(shown, file, outputs)
    return page


def answer(showcase: Showcase, path: str | None) -> list[Any]:
    """The values of the page's outputs for a file; one line and nothing else where it cannot be used."""
    found, said = Findings(), ""
    if path is not None:
        try:
            found = showcase.look(path)
            said = "\n\n".join(found.notes)
        except Exception as error:
            if not isinstance(error, ValueError):  # a fault of ours: its traceback is for us
                logger.exception("of %s", path)
            said = f"**Cannot be used:** {str(error) if isinstance(error, ValueError) else one_line(error)}"
    values = [said]
    if showcase.classify:
        values.append(found.classes)
    if showcase.neighbours:
        values.append(_rows(found.neighbours))
    return values + [_drawn(found.pictures.get(name)) for name in showcase.pictures]


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ArgumentError("--serve needs gradio: pip install 'bridle_hf[serve]'") from error
    return gradio


def _theme() -> Any:
    """gradio's own, in the fonts of the system: none is fetched."""
    return _gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _input(gradio: Any, modality: str) -> Any:
    if modality == "audio":
        return gradio.Audio(label="A recording", type="filepath", elem_id="file", buttons=["download"])
    # gradio's own inputs of pictures and videos read them, and fail, before we can say why.
    label = {"image": "An image", "video": "A video"}[modality]
    return gradio.File(label=label, type="filepath", file_types=list(MODALITIES[modality].extensions), elem_id="file")


def _introduction(showcase: Showcase, name: str) -> str:
    lines = [f"# {name}", f"BRIDLE models of {showcase.config.modality}: {', '.join(showcase.paths)}."]
    return "\n\n".join([*lines, " ".join(showcase.missing)])


def _rows(neighbours: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A table as gradio takes it."""
    if not neighbours:
        return None
    rows = [[f"{row['similarity']:.3f}", *(value for name, value in row.items() if name != "similarity")]
            for row in neighbours]  # fmt: skip
    return {"headers": list(neighbours[0]), "data": rows}


def _drawn(figure: Any) -> Image.Image | None:
    if figure is None:
        return None
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return Image.open(picture)
