"""Memory and time that extreme files of under 1 MB take in loaders and in pipelines.

python -m pytest tests/data/test_extreme_files.py -s      # prints what was measured
"""

import json

import pytest
from helpers.extreme_files import PICTURES, SOUNDS, VIDEOS, WAYS, write_extremes
from helpers.fresh_process import run_fresh
from PIL import Image

from bridle_hf.common.errors import MediaError
from bridle_hf.data.decoding import read_image


MOST_MEMORY = 500  # MB above the process that reads
READ = {
    "image": "rgb.png rgba.webp key.png deep_rgb.png as_thin_and_as_large_as_may_be.png rgba_half.jp2 turned.png",
    "video": "plain.mp4 large.mp4 many_references.mp4 one_key_frame.mp4 small.mkv nan_tag.mkv infinite_tag.mkv",
    "audio": "hour.flac hour_of_unknown_length.flac telephone.wav long.m4a understated.mp3 many_channels.flac",
}
SKIPPED = {
    "image": "high.png wide.png vast.png lying.png deep_grey.png float_absurd.tif lying_width.tif rgba.jp2",
    "video": "too_large.mp4 vast_later.mkv vast_behind_a_small_header.mkv high.mkv wide.mkv endless.mp4 "
    "endless_tag.mkv fast.avi slow.avi",
    "audio": "value_1e+10.wav value_1e+19.wav value_1e+38.wav value_inf.wav value_nan.wav channels.ogg lying_rate.wav",
}


@pytest.mark.slow
@pytest.mark.parametrize("modality", WAYS)
def test_memory_of_extreme_files(tmp_path, modality):
    files = write_extremes(tmp_path / "files", modality)
    code = f"""
        import json
        from pathlib import Path
        from helpers.extreme_files import read_all
        for found in read_all({modality!r}, {files!r}, Path({str(tmp_path)!r})):
            print("found", json.dumps(found), flush=True)
    """
    printed = run_fresh(code, tmp_path / "run", package=True).splitlines()
    found = [json.loads(line.removeprefix("found ")) for line in printed if line.startswith("found ")]
    assert len(found) == len(files) * len(WAYS[modality])
    for entry in sorted(found, key=lambda entry: -entry["memory"]):
        print("{file:32} {way:14} {memory:5} MB {seconds:6} s, cpu {cpu:5} s  {outcome:.90}".format(**entry))
    assert not [entry for entry in found if entry["memory"] > MOST_MEMORY]
    # Loaders and pipelines read, or refuse, and nothing else.
    outcomes = {(entry["file"], entry["way"]): entry["outcome"].split(":")[0] for entry in found}
    assert set(outcomes.values()) <= {"read", "MediaError", "ValueError"}
    for names, expected in ((READ[modality], {"read"}), (SKIPPED[modality], {"MediaError", "ValueError"})):
        ways = ("training", "evaluation", "pipeline")
        assert {outcomes[name, way] for name in names.split() for way in ways} <= expected


def test_the_corpus_is_varied():
    assert len(PICTURES) + len(VIDEOS) + len(SOUNDS) > 80


@pytest.mark.parametrize(
    "size, reason", [((1, 20000), "longer than 32 times"), ((5001, 5000), "more than 25.0 million")]
)
def test_pictures_that_would_take_gigabytes(tmp_path, size, reason):
    for width, height in (size, size[::-1]):
        Image.new("1", (width, height)).save(tmp_path / "a.png")
        with pytest.raises(MediaError, match=f"is {width} x {height} pixels, {reason}"):
            read_image(str(tmp_path / "a.png"))
