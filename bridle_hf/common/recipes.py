"""Recipes: YAML files of arguments that come with the package and are found by their bare name, as `audio_base`."""

from pathlib import Path

from bridle_hf.common.errors import ArgumentError, nearest


FOLDER = Path(__file__).parents[1] / "recipes"


def list_recipes() -> dict[str, str]:
    """By name, the first line of the comment that a recipe begins with."""
    lines = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: line.lstrip("# ") for name, line in lines.items()}


def find_recipe(name: str, folder: Path = FOLDER) -> Path:
    """The file of a recipe: one of the package (of `folder`) by its bare name, or any by its path.

    Paths of before the recipes were part of the package, `training/recipes/NAME.yaml`, mean those of the package.

    Raises:
        ArgumentError: there is no such recipe and no such file; names the nearest.
    """
    packaged, path = folder / f"{name}.yaml", Path(name)
    if "/" not in name and packaged.is_file():
        return packaged
    if path.exists():
        return path
    old = path.suffix == ".yaml" and path.parts[:-1][-2:] in ((), ("training", "recipes"))
    if old and (folder / path.name).is_file():
        return folder / path.name
    hint = nearest(path.stem, [entry.stem for entry in folder.glob("*.yaml")])
    raise ArgumentError(
        f"recipe {name}: No such file, nor a recipe of the package{hint} (`bridle recipes` lists them)"
    )
