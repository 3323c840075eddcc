"""Sets on the Hub (a stand-in for it), by id: downloaded first, or streamed as shards where they lie."""

import io
import json

import datasets
import pytest
from helpers.fresh_process import run_fresh
from helpers.hub_stand_in import running_hub


FIND = """
    import json, os
    from bridle_hf.data.finding import find_samples

    os.environ["BRIDLE_SHARD_CACHE"] = "shards"
    ways = {"downloaded": {}, "streamed": {"streaming": True}, "revised": {"streaming": True, "revision": "main"}}
    found = {}
    for name, options in ways.items():
        samples = find_samples("org/set", "audio", config="small", **options)
        found[name] = [(s.label, s.split, s.class_order, s.media().decode()) for s in samples]
    found["place"] = samples[0].place[0]
    found["test"] = len(find_samples("org/set", "audio", "test", config="small", streaming=True))
    found["labelled"] = len(find_samples("org/set", "audio", config="small", streaming=True, need_labels=True))
    print(json.dumps(found))
"""


def parquet(sounds: list[str], numbers: list[int]) -> bytes:
    rows = datasets.Dataset.from_dict(
        {"audio": [{"bytes": sound.encode(), "path": None} for sound in sounds], "label": numbers}
    )
    rows = rows.cast_column("audio", datasets.Audio())
    file = io.BytesIO()
    rows.cast_column("label", datasets.ClassLabel(names=["zebra", "ant", "unseen"])).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def hub():
    with running_hub() as server:
        server.repos["org/set"] = []
        small = {"train": (["a", "b"], [0, 1]), "test": (["c"], [-1])}  # -1: not told
        files = {f"small/{split}-00000-of-00001.parquet": parquet(*rows) for split, rows in small.items()}
        files["large/train-00000-of-00001.parquet"] = parquet(["d"], [0])
        splits = "".join(f"  - split: {split}\n    path: small/{split}-*\n" for split in small)
        configs = f"- config_name: small\n  data_files:\n{splits}- config_name: large\n  data_files: large/*\n"
        files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
        server.commit("org/set", files)
        yield server


def test_a_set_is_found_by_its_id(hub, tmp_path):
    said = run_fresh(FIND, tmp_path, package=True, HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET="1")
    found = json.loads(said.strip().splitlines()[-1])
    order = ["zebra", "ant", "unseen"]
    assert sorted(found["downloaded"], key=lambda row: row[3]) == [
        ["zebra", "train", order, "a"], ["ant", "train", order, "b"], [None, "test", order, "c"],
    ]  # fmt: skip
    assert found["streamed"] == found["revised"] == found["downloaded"]
    assert found["place"].startswith("hf://datasets/org/set@") and (found["test"], found["labelled"]) == (1, 2)
