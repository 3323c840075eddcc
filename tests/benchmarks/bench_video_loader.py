"""
Frames per second that VideoLoader delivers, clips of 16 frames of 224x224 at stride 4 from a video of 320x240 in
H.264,
against loaders that decode every frame: of the video, or up to the clip's last; turned into arrays as PyAV does it
unless told otherwise (and transformers' pipeline with it), or as VideoLoader does. Also the memory of the process over
many clips. Run:

    python tests/benchmarks/bench_video_loader.py [--repetitions 15] [--num_clips 1000]

The contenders take turns within one run, so that a busy machine slows all of them; medians are reported. All crop,
flip and normalise alike, in one thread: what differs is the decoding.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from bridle_hf import BridleConfig, make_image_processor
from bridle_hf.data.loaders import VideoLoader
from bridle_hf.data.sample import Sample


NUM_FRAMES, STRIDE = 16, 4
SECONDS, RATE, SIZE = 10, 30, (320, 240)  # as a clip of Kinetics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--num_clips", type=int, default=1000, help="for the memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(write_video(Path(folder) / "video.mp4"))
        load = VideoLoader(make_image_processor(BridleConfig(modality="video")), NUM_FRAMES, STRIDE, augment=True)
        compare(load, sample, args.repetitions)
        watch_memory(load, sample, args.num_clips)


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


def compare(load, sample, repetitions):
    every = EveryFrame(load)
    contenders = {
        "every frame of the video": lambda rng: every(sample, rng, to_the_end=True),
        "every frame up to the clip's last": lambda rng: every(sample, rng, to_the_end=False),
        "of the video, arrays as VideoLoader": lambda rng: every(sample, rng, to_the_end=True, tuned=True),
        "up to the last, arrays as VideoLoader": lambda rng: every(sample, rng, to_the_end=False, tuned=True),
        "VideoLoader": lambda rng: load(sample, rng),
    }
    times = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender(np.random.default_rng(repetition))
            if repetition:  # the first is to warm up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':40}{'frames of a clip per second':>28}{'VideoLoader is faster by':>28}")
    for name, median in medians.items():
        print(f"{name:40}{NUM_FRAMES / median:28.0f}{median / medians['VideoLoader']:27.2f}x")


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
        return self.load._random_view(np.stack(frames)[chosen], rng)


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
    main()
