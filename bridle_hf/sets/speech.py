"""Speech in noise: keywords (35 words by 104 voices of a synthesizer) and spoken (nine languages, 250 ms each)."""

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr

from bridle_hf.sets.fetching import Package, fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


ESPEAK = Package("pip", "espeakng-loader", "0.2.4", "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d")
SAMPLING_RATE, SAMPLES = 16_000, 16_000
SNR_DB = 5.0
# Those of Speech Commands.
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)  # fmt: skip
COLUMNS = ("file_name", "label", "group")
# Of espeak_ng's speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1


def make_keywords(
    cache_dir: str | os.PathLike | None = None, words: Sequence[str] = WORDS, most_voices: int | None = None
) -> str:
    """Say the words once and return their folder; a later call with the same arguments finds it ready.

    The folder, `CACHE_DIR/keywords-<hash>`, holds `audio/<voice>_<word>.wav` (16 kHz, mono, 1 s, 16 bit): a word in
    the middle of a second, of one loudness, with white noise 5 dB under it (drawn for each file by its place in the
    table); and `metadata.csv` with `file_name`, `label` (the word) and `group` (the voice).

    Args:
        cache_dir: where the folder is made; the user's cache if absent.
        words: what is said.
        most_voices: the first of the voices alone.

    Raises:
        RuntimeError: the synthesizer cannot be fetched.
    """
    name = f"keywords-{content_hash(ESPEAK.sha256, SAMPLES, SNR_DB, COLUMNS, list(words), most_voices)}"
    package = fetched(ESPEAK, cache_dir) / "espeakng_loader"
    return made_once(cache_dir, name, lambda folder: _write_keywords(folder, package, words, most_voices))


def _write_keywords(folder: Path, package: Path, words: Sequence[str], most_voices: int | None) -> None:
    voices = sorted(path.name for path in (package / "espeak-ng-data" / "voices" / "!v").iterdir())[:most_voices]
    say, rate = _synthesizer(package)
    (folder / "audio").mkdir()
    rows = []
    for voice in voices:
        for word in words:
            wave = centred(soxr.resample(say(voice, word), rate, SAMPLING_RATE))
            rng = np.random.default_rng(len(rows))
            noisy = wave + rng.normal(size=SAMPLES) * 10 ** (-SNR_DB / 20)
            file_name = f"audio/{voice.replace(' ', '_')}_{word}.wav"
            soundfile.write(folder / file_name, 0.05 * noisy, SAMPLING_RATE, subtype="PCM_16")
            rows.append((file_name, word, voice))
    write_table(folder, COLUMNS, rows)


def centred(wave: np.ndarray) -> np.ndarray:
    """(SAMPLES,) of unit power over the second: a wave in the middle of silence, or the middle of a longer one."""
    spare = SAMPLES - len(wave)
    wave = np.pad(wave, (spare // 2, spare - spare // 2)) if spare > 0 else wave[-spare // 2 : -spare // 2 + SAMPLES]
    return wave / np.sqrt(np.mean(np.square(wave)))


def _synthesizer(package: Path) -> tuple[Callable[[str, str], np.ndarray], int]:
    """`say(voice, text)` -> (samples,) float32, and its sampling rate. There is one synthesizer in a process."""
    library = ctypes.CDLL(str(package / "libespeak-ng.so"))
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(package).encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"{package}: eSpeak NG does not start (status {rate})")
    parts: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples: ctypes.Array, count: int, events: int) -> int:
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        return 0

    library.espeak_SetSynthCallback(receive)

    def say(voice: str, text: str) -> np.ndarray:
        parts.clear()
        status = library.espeak_SetVoiceByName(f"en+{voice}".encode())
        words = text.encode()
        status = status or library.espeak_Synth(words, len(words) + 1, 0, 1, 0, _UTF8, None, None)
        if status or not parts:
            raise RuntimeError(f"eSpeak NG cannot say {text!r} as {voice} (status {status})")
        return np.concatenate(parts)

    say.receive = receive  # kept alive: the library holds its address alone
    return say, rate


# --- spoken languages ---

STAMPS = Package(
    "apt", "tuxpaint-stamps-default", "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)  # fmt: skip
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
CROP = 4_000  # 250 ms: of whole clips, a language is told nearly without a mistake


def make_spoken(cache_dir: str | os.PathLike | None = None, languages: Sequence[str] = LANGUAGES) -> str:
    """Cut the recordings of 9 languages once and return their folder; a later call finds it ready.

    `CACHE_DIR/spoken-<hash>` holds `audio/<folders>_<stamp>_<language>.wav`, 250 ms about the loudest moment of a
    spoken description, of unit power, with white noise of the same power (drawn by the file's place in the table); and
    `metadata.csv` with `file_name`, `label` (the language) and `group` (the stamp that is described).

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    content = STAMPS.sha256, CROP, COLUMNS, list(languages), "whole paths"
    name = f"spoken-{content_hash(*content)}"
    package = fetched(STAMPS, cache_dir) / "usr" / "share" / "tuxpaint" / "stamps"
    return made_once(cache_dir, name, lambda folder: _write_spoken(folder, package, languages))


def _write_spoken(folder: Path, package: Path, languages: Sequence[str]) -> None:
    (folder / "audio").mkdir()
    rows = []
    for path in sorted(package.rglob("*_desc_*.ogg")):
        stamp, _, language = path.stem.rpartition("_desc_")
        if language not in languages:
            continue
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = loudest(soxr.resample(wave.mean(axis=1), rate, SAMPLING_RATE))
        if not wave.any():
            continue
        wave = wave / np.sqrt(np.mean(np.square(wave)))
        noisy = wave + np.random.default_rng(len(rows)).normal(size=CROP)
        # Stamps of several folders share their names: cents of the US and of Canada.
        place = "_".join(path.relative_to(package).parts[:-1])
        file_name = f"audio/{place}_{stamp}_{language}.wav"
        soundfile.write(folder / file_name, 0.1 * noisy, SAMPLING_RATE, subtype="PCM_16")
        rows.append((file_name, language, f"{path.parent.name}/{stamp}"))
    write_table(folder, COLUMNS, rows)


def loudest(wave: np.ndarray) -> np.ndarray:
    """(CROP,) about the middle of the 25 ms with the most energy; a shorter wave is padded."""
    wave = np.pad(wave, (0, max(0, CROP - len(wave))))
    window = SAMPLING_RATE // 40
    energy = np.convolve(np.square(wave), np.ones(window), mode="same")
    start = min(max(int(energy.argmax()) - CROP // 2, 0), len(wave) - CROP)
    return wave[start : start + CROP]
