"""The **notes** set of the demo: one-second notes of the General MIDI instruments, rendered from a real soundfont.

Nothing is fetched: the soundfont (TimGM6mb.sf2) lies in the installed package `pretty_midi`, the synthesizer is
`tinysoundfont`; `pip install pretty_midi==0.2.11.post0 tinysoundfont==0.3.7 --no-deps` brings both.
Run as a script, this file prints the folder that holds the notes.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile


SAMPLING_RATE = 16_000
NOTE_ON_SAMPLES = 12_800  # 0.8 s sounding, then 0.2 s released
NOTE_SAMPLES = 16_000
VELOCITY = 100
# Some instruments have no sample for the highest keys: 10 notes of 5,376 lie below this peak, the softest of the
# others at 0.033, so that any level between would do.
SILENCE_PEAK = 0.01
SOUNDFONT_SHA256 = "82475b91a76de15cb28a104707d3247ba932e228bada3f47bba63c6b31aaf7a1"
PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
COLUMNS = ("file_name", "label", "group", "pitch_class", "octave", "pitch", "program")


def render_notes(
    cache_dir: str | os.PathLike | None = None,
    programs: Sequence[int] = range(112),
    pitches: Sequence[int] = range(36, 84),
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

    Raises:
        ModuleNotFoundError: `pretty_midi` or `tinysoundfont` is not installed.
        ValueError: a program or pitch outside 0 .. 127, none given, or every note silent.
        RuntimeError: the soundfont is not the one that the figures were measured with.
    """
    programs, pitches = list(programs), list(pitches)
    for name, values in (("programs", programs), ("pitches", pitches)):
        if not values or not all(0 <= value <= 127 for value in values):
            raise ValueError(f"`{name}` must be one or more integers in 0..127, got {values}")
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = root / f"notes-{_content_hash(programs, pitches)}"
    if folder.is_dir():  # it appears by one rename, hence whole or not at all
        return str(folder)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=root))
    try:
        _write_notes(unfinished, programs, pitches)
        unfinished.chmod(0o755)  # mkdtemp leaves it to the owner alone
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process was faster with the same notes
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def default_cache_dir() -> Path:
    """The folder of this project in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridle_hf"


def _content_hash(programs: list[int], pitches: list[int]) -> str:
    rules = [SAMPLING_RATE, NOTE_ON_SAMPLES, NOTE_SAMPLES, VELOCITY, SILENCE_PEAK, SOUNDFONT_SHA256, COLUMNS]
    return hashlib.sha256(json.dumps([rules, programs, pitches]).encode()).hexdigest()[:12]


def _write_notes(folder: Path, programs: list[int], pitches: list[int]) -> None:
    names = _instrument_names()
    (folder / "audio").mkdir()
    rows = []
    for program, pitch, waveform in _rendered(programs, pitches):
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
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def _rendered(programs: list[int], pitches: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (program, pitch, float32 waveform (NOTE_SAMPLES,)), each note as from a synthesizer just switched on."""
    from tinysoundfont import Synth

    synthesizer = Synth(samplerate=SAMPLING_RATE)
    soundfont = synthesizer.sfload(str(_soundfont_path()))
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
    # Found, not imported: importing it needs mido, and only its files are wanted.
    spec = importlib.util.find_spec("pretty_midi")
    if spec is None:
        raise ModuleNotFoundError(
            "the notes need the soundfont of pretty_midi: "
            "pip install --no-deps pretty_midi==0.2.11.post0 tinysoundfont==0.3.7"
        )
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the notes set and print its folder.")
    parser.add_argument("--cache_dir", help="where to make the folder (default: bridle_hf in the user's cache)")
    print(render_notes(parser.parse_args().cache_dir))


if __name__ == "__main__":
    main()
