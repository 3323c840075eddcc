"""Sounds that the released audio encoder is trained on: notes, drums, recordings, invented words, mixtures of them.

Every clip is a function of the seed and of its number. Permissive licences alone: see `materials.py`.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.signal import fftconvolve

from bridle_hf.release.materials import FLITE, FLUID, GENERAL, RECORDINGS
from bridle_hf.sets.fetching import fetched
from bridle_hf.sets.making import content_hash, made_once, write_table


SAMPLING_RATE = 16_000
# 1.5 s: a crop of it is what the encoder sees. Some are shorter, so that it knows padding.
SAMPLES, LEAST_SAMPLES, SHORT = 24_000, 4_000, 0.25
KINDS = {"note": 0.22, "chord": 0.1, "phrase": 0.15, "drums": 0.15, "recording": 0.15, "speech": 0.23}
MIXED, ECHOING, NOISY = 0.25, 0.15, 0.4
LEVELS_DB, SILENCE_PEAK = (-40.0, -12.0), 0.01
DRUMS = 128  # the bank of a General MIDI soundfont that holds drum kits
VOICES = ("awb", "kal16", "rms", "slt")
SPEECH_NOISE = 0  # seed of the noise in a voice: what is said must not depend on what was said before
ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "y", "z", "sh", "ch", "th",
          "bl", "br", "dr", "fl", "fr", "gr", "kl", "pl", "pr", "sk", "sl", "sp", "st", "str", "tr")  # fmt: skip
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ay", "ee", "oa", "oo", "ou", "oy", "ar", "er", "or")
CODAS = ("", "", "b", "d", "f", "g", "k", "l", "m", "n", "p", "s", "t", "v", "z", "sh", "ch", "nd", "nt", "st", "lk")

Wave = np.ndarray
# Plays (sample, channel, key, velocity, samples) for so many samples in all.
Notes = list[tuple[int, int, int, int, int]]


def make_sounds(cache_dir: str | os.PathLike | None = None, count: int = 16_000, seed: int = 0) -> str:
    """Render the clips once and return their folder; a later call with the same arguments finds it ready.

    The folder, `CACHE_DIR/release_sounds-<hash>`, holds `audio/<number>.wav` (16 kHz, mono, 16 bit, 0.25 to 1.5 s) and
    `metadata.csv` with `file_name` and `label`, the kind of sound. The first clips of a larger count are those of a
    smaller one.

    Raises:
        ModuleNotFoundError: `tinysoundfont` is not installed.
        RuntimeError: a package cannot be fetched, or the speech synthesizer not be loaded.
    """
    materials = [FLUID, GENERAL, RECORDINGS, FLITE]
    rules = [SAMPLES, LEAST_SAMPLES, SHORT, KINDS, MIXED, ECHOING, NOISY, LEVELS_DB, VOICES, SPEECH_NOISE, ONSETS,
             NUCLEI, CODAS]  # fmt: skip
    hashes = [material.package.sha256 for material in materials]
    fluid, general, recordings, flite = (fetched(material.package, cache_dir) / "usr" for material in materials)

    def write(folder: Path) -> None:
        band = Band(
            [
                fluid / "share" / "fluidr3mono-gm-soundfont" / "FluidR3Mono_GM.sf3",
                general / "share" / "sounds" / "sf3" / "MuseScore_General_Lite.sf3",
            ]
        )
        recorded = read_recordings(recordings / "share" / "sonic-pi" / "samples")
        speech = speakers(flite / "lib" / "x86_64-linux-gnu")
        sources = {
            "note": lambda rng: band.play(rng, note),
            "chord": lambda rng: band.play(rng, chord),
            "phrase": lambda rng: band.play(rng, phrase),
            "drums": lambda rng: band.play(rng, hits, drums=True),
            "recording": lambda rng: resampled(piece(recorded[rng.integers(len(recorded))], rng), rng, 0.6, 1.6),
            "speech": lambda rng: resampled(speech[rng.integers(len(speech))](sentence(rng)), rng, 0.75, 1.35),
        }
        write_sounds(folder, sources, count, seed)

    return made_once(cache_dir, f"release_sounds-{content_hash(hashes, rules, count, seed)}", write)


def write_sounds(
    folder: Path, sources: dict[str, Callable[[np.random.Generator], Wave]], count: int, seed: int
) -> None:
    """Clips of these sources, drawn by `KINDS`: some mixed with a second one, echoing, in noise; each at its level."""
    (folder / "audio").mkdir()
    rows = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind, other = rng.choice(list(KINDS), p=list(KINDS.values()), size=2)
        samples = int(rng.integers(LEAST_SAMPLES, SAMPLES)) if rng.random() < SHORT else SAMPLES
        wave = cut(sources[kind](rng), rng, samples)
        if rng.random() < MIXED:
            wave = wave + at_power(cut(sources[other](rng), rng, samples), power(wave), rng.uniform(-12, 6))
        if rng.random() < ECHOING:
            wave = echoing(wave, rng)
        if rng.random() < NOISY:
            wave = wave + at_power(noise(rng, samples), power(wave), rng.uniform(-25, 0))
        wave = at_power(wave, 1.0, rng.uniform(*LEVELS_DB))
        wave = wave / max(np.abs(wave).max(), 1.0)  # a click at a high level
        soundfile.write(folder / f"audio/{number:05d}.wav", wave, SAMPLING_RATE, subtype="PCM_16")
        rows.append((f"audio/{number:05d}.wav", kind))
    write_table(folder, ("file_name", "label"), rows)


# --- Waves ---


def power(wave: Wave) -> float:
    return float(np.mean(np.square(wave)))


def at_power(wave: Wave, reference: float, decibels: float) -> Wave:
    """Scaled to so many decibels over a power; silence stays what it is."""
    found = power(wave)
    return wave * np.sqrt(reference * 10 ** (decibels / 10) / found) if found > 0 else wave


def cut(wave: Wave, rng: np.random.Generator, samples: int) -> Wave:
    """(samples,): a piece of a longer wave about its loudest moment, or a shorter one somewhere in silence."""
    spare = samples - len(wave)
    if spare >= 0:
        before = int(rng.integers(spare + 1))
        return np.pad(wave, (before, spare - before))
    loudest = int(np.abs(wave).argmax())
    first, last = max(0, loudest - samples + 1), min(loudest, -spare)
    place = int(rng.integers(first, last + 1))
    return wave[place : place + samples]


def piece(wave: Wave, rng: np.random.Generator) -> Wave:
    """Any part of a long recording, twice as long as a clip: not all clips of it shall have the same moment."""
    place = int(rng.integers(max(0, len(wave) - 2 * SAMPLES) + 1))
    return wave[place : place + 2 * SAMPLES]


def noise(rng: np.random.Generator, samples: int) -> Wave:
    """(samples,) of a power that falls by 0 to 6 dB an octave: from white to brown."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    frequencies = np.arange(1, len(spectrum) + 1)
    return np.fft.irfft(spectrum * frequencies ** (-rng.uniform(0, 1)), samples)


def echoing(wave: Wave, rng: np.random.Generator) -> Wave:
    """In a room that falls silent, by 60 dB, within 0.1 to 0.8 s."""
    seconds = np.arange(SAMPLES // 2) / SAMPLING_RATE
    room = rng.normal(size=len(seconds)) * 10 ** (-3 * seconds / rng.uniform(0.1, 0.8))
    room[0] = np.sqrt(np.sum(np.square(room[1:])) * 10 ** rng.uniform(-0.5, 1))  # what comes straight
    return fftconvolve(wave, room)[: len(wave)]


def resampled(wave: Wave, rng: np.random.Generator, slowest: float, fastest: float) -> Wave:
    """Played slower or faster, lower or higher with it."""
    return soxr.resample(wave, SAMPLING_RATE * rng.uniform(slowest, fastest), SAMPLING_RATE)


def read_recordings(folder: Path) -> list[Wave]:
    """Mono, at `SAMPLING_RATE`, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.flac")):
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        found.append(soxr.resample(wave.mean(axis=1), rate, SAMPLING_RATE))
    return found


# --- Notes ---


class Band:
    """Soundfonts, each with 128 instruments and its drum kits."""

    def __init__(self, paths: Sequence[Path]):
        from tinysoundfont import Synth

        self.synthesizer = Synth(samplerate=SAMPLING_RATE)
        self.fonts = [self.synthesizer.sfload(str(path)) for path in paths]
        self.kits = {
            font: [number for number in range(128) if self.synthesizer.sfpreset_name(font, DRUMS, number)]
            for font in self.fonts
        }

    def play(
        self, rng: np.random.Generator, compose: Callable[[np.random.Generator], Notes], drums: bool = False
    ) -> Wave:
        """(SAMPLES,) of two random instruments, or kits, of one font; composed anew where they have no such notes."""
        while True:
            font = self.fonts[rng.integers(len(self.fonts))]
            for channel in (0, 1):
                program = rng.choice(self.kits[font]) if drums else rng.integers(128)
                self.synthesizer.program_select(channel, font, DRUMS if drums else 0, int(program), drums)
            wave = self._play(compose(rng))
            if np.abs(wave).max() >= SILENCE_PEAK:
                return wave

    def _play(self, notes: Notes) -> Wave:
        synthesizer = self.synthesizer
        synthesizer.sounds_off()
        synthesizer.generate(SAMPLING_RATE // 100)  # what sounded before fades within 10 ms: keep it out of this
        moments = [(start, 1, channel, key, velocity) for start, channel, key, velocity, _ in notes]
        moments += [(start + samples, 0, channel, key, 0) for start, channel, key, _, samples in notes]
        parts, now = [], 0
        for moment, sounds, channel, key, velocity in [*sorted(moments), (SAMPLES, 0, 0, 0, 0)]:
            if moment > SAMPLES:
                continue
            if moment > now:
                parts.append(bytes(synthesizer.generate(moment - now)))
                now = moment
            if sounds:
                synthesizer.noteon(channel, key, velocity)
            else:
                synthesizer.noteoff(channel, key)
        return np.frombuffer(b"".join(parts), dtype=np.float32).reshape(-1, 2).mean(axis=1)


def note(rng: np.random.Generator) -> Notes:
    start, samples = rng.integers(4_000), rng.integers(3_000, SAMPLES)
    return [(int(start), 0, int(rng.integers(24, 97)), int(rng.integers(40, 128)), int(samples))]


def chord(rng: np.random.Generator) -> Notes:
    """Two to four keys of one instrument at once, within an octave or so."""
    ((start, channel, key, velocity, samples),) = note(rng)
    others = key + rng.choice(np.arange(1, 17), size=rng.integers(1, 4), replace=False)
    return [(start, channel, int(pitch), velocity, samples) for pitch in (key, *others)]


def phrase(rng: np.random.Generator) -> Notes:
    """Three to eight notes in a row, at equal times, of one or two instruments."""
    count, key = int(rng.integers(3, 9)), int(rng.integers(36, 85))
    step, two = SAMPLES // count, rng.random() < 0.3
    return [
        (number * step, int(two and rng.integers(2)), int(np.clip(key + rng.integers(-12, 13), 24, 96)),
         int(rng.integers(40, 128)), int(step * rng.uniform(0.3, 1.2)))
        for number in range(count)
    ]  # fmt: skip


def hits(rng: np.random.Generator) -> Notes:
    """One to six hits on a drum kit."""
    return [
        (int(rng.integers(SAMPLES - 4_000)), 0, int(rng.integers(27, 88)), int(rng.integers(40, 128)), SAMPLES)
        for _ in range(rng.integers(1, 7))
    ]


# --- Speech ---


def sentence(rng: np.random.Generator) -> str:
    """Two to four words that no language has, so that a synthesizer says all kinds of syllables."""
    words = ["".join(_syllable(rng) for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(2, 5))]
    return " ".join(words)


def _syllable(rng: np.random.Generator) -> str:
    return "".join(part[rng.integers(len(part))] for part in (ONSETS, NUCLEI, CODAS))


class _FliteWave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


def speakers(folder: Path) -> list[Callable[[str], Wave]]:
    """`say(text)` -> (samples,) float32 at `SAMPLING_RATE`, one for each of `VOICES`, of Flite's libraries."""
    names = ["flite", "flite_usenglish", "flite_cmulex", *(f"flite_cmu_us_{voice}" for voice in VOICES)]
    try:
        # In this order: each finds those that it needs among the ones before.
        libraries = [ctypes.CDLL(str(folder / f"lib{name}.so.2.2"), mode=ctypes.RTLD_GLOBAL) for name in names]
    except OSError as error:
        raise RuntimeError(f"Flite cannot be loaded: {error}; it is for Linux on x86-64, with libasound2") from error
    flite = libraries[0]
    flite.flite_text_to_wave.restype = ctypes.POINTER(_FliteWave)
    flite.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    flite.delete_wave.argtypes = [ctypes.c_void_p]
    flite.flite_init()
    noise_of = ctypes.CDLL(None)  # Flite draws the noise of a voice by the C library's `rand`

    def speaker(library: ctypes.CDLL, voice: str) -> Callable[[str], Wave]:
        register = getattr(library, f"register_cmu_us_{voice}")
        register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        handle = register(None)

        def say(text: str) -> Wave:
            noise_of.srand(SPEECH_NOISE)
            said = flite.flite_text_to_wave(text.encode(), handle)
            if not said or said.contents.rate != SAMPLING_RATE:
                raise RuntimeError(f"Flite cannot say {text!r} as {voice} at {SAMPLING_RATE} Hz")
            wave = np.ctypeslib.as_array(said.contents.samples, (said.contents.count,)).astype(np.float32) / 32768
            flite.delete_wave(said)
            return wave

        return say

    return [speaker(library, voice) for library, voice in zip(libraries[3:], VOICES)]
