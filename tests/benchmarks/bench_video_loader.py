"""
Clips of 16 frames of 224x224 at stride 4 from a video of 320x240 in H.264, by VideoLoader, against loaders that decode
every frame: of the video, or up to the clip's last; turned into arrays as PyAV does it unless told otherwise (and
transformers' pipeline with it), or as VideoLoader does. Clips are compared first. All crop, flip and normalise alike,
in one thread: what differs is the decoding. `--memory CLIPS` watches the process over so many clips instead.
"""

import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from harness import race, run

from bridle_hf import BridleConfig, make_image_processor
from bridle_hf.data.loaders import VideoLoader
from bridle_hf.data.sample import Sample


NUM_FRAMES, STRIDE = 16, 4
CLIPS = 4  # per turn
SECONDS, RATE, SIZE = 10, 30, (320, 240)  # as a clip of Kinetics


def rows(rounds):
    with tempfile.TemporaryDirectory() as folder:
        load, sample = make_loader(), Sample(write_video(Path(folder) / "video.mp4"))
        yield from compare(load, sample, rounds)


def make_loader():
    return VideoLoader(make_image_processor(BridleConfig(modality="video")), NUM_FRAMES, STRIDE, augment=True)


def write_video(path):
    """Noise that drifts, so that motion is there to be predicted; the encoder's own key frames."""
    scene = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8 + 40, SIZE[0] // 8 + 40, 3), dtype=np.uint8)
    scene = scene.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for index in range(SECONDS * RATE):
            view = np.ascontiguousarray(scene[index : index + SIZE[1], index : index + SIZE[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def compare(load, sample, rounds):
    every = EveryFrame(load)
    peers = {
        "every frame of the video, by PyAV": {"to_the_end": True},
        "every frame up to the clip's last, by PyAV": {"to_the_end": False},
        "every frame of the video, arrays as ours": {"to_the_end": True, "tuned": True},
        "every frame up to the last, arrays as ours": {"to_the_end": False, "tuned": True},
    }

    def clips(loads, **options):
        """The same ones at each turn."""
        return [loads(sample, np.random.default_rng(number), **options) for number in range(CLIPS)]

    for found, expected in zip(clips(load), clips(every, to_the_end=True, tuned=True)):
        torch.testing.assert_close(found, expected)
    contenders = {name: lambda options=options: clips(every, **options) for name, options in peers.items()}
    yield from race("a clip of 16 frames of a video", lambda: clips(load), contenders, rounds, scale=CLIPS)


class EveryFrame:
    """The same clips and crops, from a decoder that turns every frame into an array and then takes those chosen."""

    def __init__(self, load):
        self.load = load

    def __call__(self, sample, rng, to_the_end, tuned=False):
        reformatter = VideoReformatter()
        with av.open(sample.path) as container:
            stream = container.streams.video[0]
            chosen = self.load._choose(stream.frames, sample, rng, 0.5)
            frames = []
            for index, frame in enumerate(container.decode(stream)):
                if index > chosen[-1] and not to_the_end:
                    break
                if tuned:
                    frame = reformatter.reformat(frame, format="rgb24", threads=1)
                frames.append(frame.to_ndarray(format="rgb24"))
        view = self.load._viewer(rng)
        views = np.stack([view(frame) for frame in np.stack(frames)[chosen]])
        return {"pixel_values_videos": self.load._finish(torch.from_numpy(views), rng)}


def watch_memory(load, sample, num_clips):
    print(f"\n{'clips':>10}{'resident MiB':>16}")
    for index in range(num_clips + 1):
        load(sample, np.random.default_rng(index))
        if index % max(num_clips // 5, 1) == 0:
            print(f"{index:10}{resident_mib():16.1f}", flush=True)


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    if "--memory" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            video = Sample(write_video(Path(folder) / "video.mp4"))
            watch_memory(make_loader(), video, int(sys.argv[sys.argv.index("--memory") + 1]))
    else:
        run(__doc__, [rows], rounds=9)
