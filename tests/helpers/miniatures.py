"""Miniatures of data sets as they are downloaded: the set's own folders and files in its own format, few samples.

Each writer returns the folder. Rows are written as in the originals: headers, quotes, blanks and line ends too.
"""

import json
from pathlib import Path

import numpy as np
from helpers.pixels import frames_of
from helpers.sounds import RATE, sound
from PIL import Image


ESC50 = {"dog": 0, "chirping_birds": 14, "chainsaw": 41}
URBAN = {"air_conditioner": 0, "car_horn": 1, "dog_bark": 3}
KINDS = ("tone", "noise", "click")


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_sound(path: Path, kind: int = 0, seed: int = 0) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    samples = sound(KINDS[kind % len(KINDS)], np.random.default_rng(seed), 0.3)
    soundfile.write(path, samples, RATE, format="WAV")


def write_image(path: Path, bright: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = frames_of("bright" if bright else "dark", np.random.default_rng(0), 1)[0]
    Image.fromarray(pixels).save(path, format="JPEG")


def write_clip(path: Path, bright: bool = True) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in frames_of("bright" if bright else "dark", np.random.default_rng(0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))


# --- Sounds ---


def write_esc50(root: Path, folds: int = 5, takes: int = 1) -> Path:
    """`ESC-50-master`: a source recording of each class in each fold."""
    folder = root / "ESC-50-master"
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, folds + 1):
        for kind, (category, target) in enumerate(ESC50.items()):
            for take in "ABC"[:takes]:
                source = 100000 + 100 * fold + target
                name = f"{fold}-{source}-{take}-{target}.wav"
                rows.append(f"{name},{fold},{target},{category},{target == 0},{source},{take}")
                write_sound(folder / "audio" / name, kind, seed=source + ord(take))
    write_text(folder / "meta" / "esc50.csv", "\n".join(rows) + "\n")
    write_text(folder / "README.md", "# ESC-50\n")
    return folder


def write_urbansound8k(root: Path, folds: int = 10) -> Path:
    folder = root / "UrbanSound8K"
    rows = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, folds + 1):
        for kind, (name, number) in enumerate(URBAN.items()):
            source = 100000 + 10 * fold + number
            file = f"{source}-{number}-0-0.wav"
            rows.append(f"{file},{source},0.0,0.317551,1,{fold},{number},{name}")
            write_sound(folder / "audio" / f"fold{fold}" / file, kind, seed=source)
    write_text(folder / "metadata" / "UrbanSound8K.csv", "\n".join(rows) + "\n")
    return folder


def write_speech_commands(root: Path) -> Path:
    """Three words of four speakers, one of whom validates and one tests."""
    folder = root / "speech_commands_v0.02"
    speakers = {"0a2b400e": None, "1b4c9b89": None, "c50f55b8": "validation_list", "bb05582b": "testing_list"}
    lists: dict[str, list[str]] = {"validation_list": [], "testing_list": []}
    for kind, word in enumerate(("yes", "bed", "no")):
        for speaker, part in speakers.items():
            name = f"{word}/{speaker}_nohash_0.wav"
            write_sound(folder / name, kind, seed=len(name))
            if part:
                lists[part].append(name)
    write_sound(folder / "_background_noise_" / "running_tap.wav", 1)
    write_text(folder / "_background_noise_" / "README.md", "noise\n")
    for part, names in lists.items():
        write_text(folder / f"{part}.txt", "\n".join(names) + "\n")
    return folder


AUDIOSET = [("/m/09x0r", "Speech"), ("/m/05zppz", "Male speech, man speaking"), ("/m/04rlf", "Music"),
            ("/t/dd00088", "Gush")]  # fmt: skip
AUDIOSET_CLIPS = {
    "balanced_train_segments": {"--PJHxphWEs": "/m/09x0r,/t/dd00088", "-0RWZT-miFs": "/m/04rlf"},
    "unbalanced_train_segments": {"Yabcdefghij": "/m/09x0r,/m/05zppz", "zzzzz_zzzzz": "/m/04rlf"},
    "eval_segments": {"-0Gj8-vB1q4": "/m/04rlf,/m/09x0r", "__u1yKWMC7E": "/t/dd00088"},
}


def write_audioset(root: Path, clip: str = "{part}/{video}.wav") -> Path:
    """`clip`: the name of one, with {part} (the list without .csv) and {video}."""
    folder = root / "audioset"
    rows = [f'{number},{mid},"{label}"' for number, (mid, label) in enumerate(AUDIOSET)]
    write_text(folder / "class_labels_indices.csv", "index,mid,display_name\n" + "\n".join(rows) + "\n")
    for part, clips in AUDIOSET_CLIPS.items():
        head = [
            "# Segments csv created Sun Mar  5 10:54:31 2017",
            f"# num_ytids={len(clips)}, num_segs={len(clips)}, num_unique_labels=527, num_positive_labels=4",
            "# YTID, start_seconds, end_seconds, positive_labels",
        ]
        rows = [f'{video}, 30.000, 40.000, "{mids}"' for video, mids in clips.items()]
        write_text(folder / f"{part}.csv", "\n".join([*head, *rows]) + "\n")
        for video, mids in clips.items():
            write_sound(folder / clip.format(part=part, video=video), len(mids))
    return folder


FSD50K = [("Accelerating_and_revving_and_vroom", "/m/07q2z82"), ("Bark", "/m/05tny_"), ("Dog", "/m/0bt9lr"),
          ("Animal", "/m/0jbk")]  # fmt: skip


def write_fsd50k(root: Path) -> Path:
    folder = root / "FSD50K"
    vocabulary = [f"{number},{name},{mid}" for number, (name, mid) in enumerate(FSD50K)]
    write_text(folder / "FSD50K.ground_truth" / "vocabulary.csv", "\n".join(vocabulary) + "\n")
    dev = [("64760", "Bark,Dog,Animal", "train"), ("16399", "Dog,Animal", "train"), ("21", "Animal", "val"),
           ("8", "Accelerating_and_revving_and_vroom", "train")]  # fmt: skip
    rows = [f'{name},"{labels}","/m/x",{split}' for name, labels, split in dev]
    write_text(folder / "FSD50K.ground_truth" / "dev.csv", "fname,labels,mids,split\n" + "\n".join(rows) + "\n")
    evaluation = [("37199", "Bark,Dog,Animal"), ("175151", "Accelerating_and_revving_and_vroom")]
    rows = [f'{name},"{labels}","/m/x"' for name, labels in evaluation]
    write_text(folder / "FSD50K.ground_truth" / "eval.csv", "fname,labels,mids\n" + "\n".join(rows) + "\n")
    for name, labels, _ in dev:
        write_sound(folder / "FSD50K.dev_audio" / f"{name}.wav", len(labels))
    for name, labels in evaluation:
        write_sound(folder / "FSD50K.eval_audio" / f"{name}.wav", len(labels))
    return folder


# --- Images ---

SYNSETS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}


def write_imagenet(root: Path) -> Path:
    folder = root / "imagenet"
    data = folder / "ILSVRC" / "Data" / "CLS-LOC"
    text = "\n".join(f"{synset} {name}" for synset, name in SYNSETS.items())
    write_text(folder / "LOC_synset_mapping.txt", text + "\n")
    solution = ["ImageId,PredictionString"]
    for number, synset in enumerate(SYNSETS):
        for image in range(2):
            write_image(data / "train" / synset / f"{synset}_{image}.JPEG", number > 0)
        # The last first, as the order of validation images tells nothing of their classes.
        name = f"ILSVRC2012_val_{3 - number:08d}"
        solution.append(f"{name},{synset} 111 108 441 193 {synset} 1 2 3 4 ")
        write_image(data / "val" / f"{name}.JPEG", number > 0)
    write_image(data / "test" / "ILSVRC2012_test_00000001.JPEG", True)
    write_text(folder / "LOC_val_solution.csv", "\n".join(solution) + "\n")
    return folder


# --- Videos ---

KINETICS = {
    "train": [("abseiling", "-3B32lodo2M", 59, 69), ("air drumming", "_dbcJuKJQNs", 40, 50),
              ("zumba", "0wR5jVB-WPk", 417, 427)],
    "val": [("zumba", "--07WQ2iBlw", 1, 11), ("abseiling", "-7kbO0v4hag", 107, 117)],
}  # fmt: skip


def write_kinetics(root: Path) -> Path:
    folder = root / "k400"
    for split, rows in KINETICS.items():
        lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for label, video, start, end in rows:
            quoted = f'"{label}"' if " " in label else label
            lines.append(f"{quoted},{video},{start},{end},{split},0")
            write_clip(
                folder / split / label.replace(" ", "_") / f"{video}_{start:06d}_{end:06d}.mp4", label == "zumba"
            )
        write_text(folder / "annotations" / f"{split}.csv", "\n".join(lines) + "\n")
    write_text(folder / "annotations" / "test.csv", "youtube_id,time_start,time_end,split\n--g8aKdmXRs,3,13,test\n")
    write_clip(folder / "test" / "--g8aKdmXRs_000003_000013.mp4")
    return folder


SSV2 = {"Approaching something with your camera": "0", "Holding something next to something": "1",
        "Attaching something to something": "2"}  # fmt: skip


def write_ssv2(root: Path, prefix: str = "", place: str = "labels") -> Path:
    folder = root / "ssv2"
    write_text(folder / place / f"{prefix}labels.json", json.dumps(SSV2, indent=0))
    parts = {
        "train": [("78687", "Holding [something] next to [something]"),
                  ("42326", "Attaching [something] to [something]"),
                  ("100904", "Approaching [something] with your camera")],
        "validation": [("74225", "Attaching [something] to [something]")],
    }  # fmt: skip
    for part, rows in parts.items():
        entries = [{"id": video, "label": "holding potato next to vicks vaporub bottle", "template": template,
                    "placeholders": ["potato", "vicks vaporub bottle"]} for video, template in rows]  # fmt: skip
        write_text(folder / place / f"{prefix}{part}.json", json.dumps(entries))
    write_text(folder / place / f"{prefix}test.json", json.dumps([{"id": "1420"}]))
    for video in ("78687", "42326", "100904", "74225", "1420"):
        write_clip(folder / "20bn-something-something-v2" / f"{video}.webm")
    return folder


UCF = {"ApplyEyeMakeup": 1, "HandstandPushups": 2}


def ucf_videos() -> list[str]:
    """25 groups of each class, a clip of each."""
    spelled = {"HandstandPushups": "HandStandPushups"}  # as in the original
    return [f"{name}/v_{spelled.get(name, name)}_g{group:02d}_c01.avi" for name in UCF for group in range(1, 26)]


def write_ucf101(root: Path, lists: tuple[int, ...] = (1, 2, 3)) -> Path:
    """The official lists test groups 1-7, 8-14 and 15-21."""
    folder, group = root / "UCF101", lambda path: int(path.split("_g")[1][:2])
    write_text(
        folder / "ucfTrainTestlist" / "classInd.txt", "".join(f"{number} {name}\r\n" for name, number in UCF.items())
    )
    for number in lists:
        held_out = range(7 * number - 6, 7 * number + 1)
        test = [path for path in ucf_videos() if group(path) in held_out]
        train = [f"{path} {UCF[path.split('/')[0]]}" for path in ucf_videos() if group(path) not in held_out]
        write_text(folder / "ucfTrainTestlist" / f"testlist{number:02d}.txt", "\r\n".join(test) + "\r\n")
        write_text(folder / "ucfTrainTestlist" / f"trainlist{number:02d}.txt", "\r\n".join(train) + "\r\n")
    for path in ucf_videos():
        write_text(folder / "UCF-101" / path, "")  # not read in tests of what is found
    return folder
