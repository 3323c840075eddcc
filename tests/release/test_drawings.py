"""Pictures and videos of the release: functions of seed and number; drawings whole; physics that keeps its laws."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bridle_hf.data.finding import find_samples
from bridle_hf.release import drawings, motion
from bridle_hf.release.drawings import Drawings


SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine stars and a bird, each a red square amid what is transparent, and one that is too large to open."""
    root = tmp_path_factory.mktemp("png")
    for number in range(10):
        path = root / ("shapes/stars" if number else "animals") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (50 + number, 70))
        picture.paste((255, 0, 0, 255), (10, 20, 40, 50))
        picture.save(path)
    Image.new("1", (20_000, 10_000)).save(root / "shapes" / "large.png")
    return root


def test_drawings_without_their_borders(folder):
    found = Drawings(folder, 24)
    assert len(found.paths) == 10 and set(found.labels) == {"animals", "shapes/stars"}
    rng = np.random.default_rng(0)
    drawn = [found.draw(rng) for _ in range(400)]
    assert all(np.asarray(picture).shape == (24, 24, 4) for picture, _ in drawn)
    assert all((np.asarray(picture) == [255, 0, 0, 255]).all() for picture, _ in drawn)
    # Nine stars come three times as often as one bird.
    assert np.mean([label == "animals" for _, label in drawn]) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("write", "modality", "side"), [(drawings.write_pictures, "image", 80), (motion.write_videos, "video", 64)]
)
def test_a_sample_is_a_function_of_seed_and_number(folder, tmp_path, write, modality, side):
    def written(name, count, seed):
        (tmp_path / name).mkdir()
        write(tmp_path / name, Drawings(folder, side), count, seed)
        samples = find_samples(str(tmp_path / name), modality)
        assert len(samples) == count
        return [pixels(sample.path) for sample in samples]

    few, more, others = written("few", 4, 0), written("more", 6, 0), written("others", 4, 1)
    shape = (side, side, 3) if modality == "image" else (motion.FRAMES, side, side, 3)
    assert all(sample.shape == shape for sample in more)
    assert all(np.array_equal(a, b) for a, b in zip(few, more))
    assert not any(np.array_equal(a, b) for a, b in zip(few, others))


def pixels(path: str) -> np.ndarray:
    if path.endswith(".png"):
        return np.asarray(Image.open(path))
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Physics


def bodies(seed: int, count: int) -> list[motion.Body]:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGBA", (10, 10), "red")
    return [
        motion.Body(picture, rng.uniform(10, 30), rng.uniform(0, motion.SIDE, 2), rng.normal(size=2) * 3)
        for _ in range(count)
    ]


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_a_collision_keeps_momentum_and_energy(seed):
    pair = bodies(seed, 2)
    before = [moving.velocity for moving in pair]
    motion.collide(*pair)
    after = [moving.velocity for moving in pair]
    np.testing.assert_allclose(sum(after), sum(before), atol=1e-9)
    np.testing.assert_allclose(sum(v @ v for v in after), sum(v @ v for v in before), atol=1e-9)
    between = pair[1].position - pair[0].position
    touching = np.linalg.norm(between) < (pair[0].size + pair[1].size) / 2
    nearing = (before[0] - before[1]) @ between > 0
    assert (touching and nearing) == (not np.array_equal(after[0], before[0]))


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(0, 0.6))
def test_what_bounces_stays_inside_and_what_wraps_comes_back(seed, gravity):
    for edges in ("bounce", "wrap"):
        moving = bodies(seed, 3)
        for _ in range(60):
            motion.step(moving, gravity, edges)
            for one in moving:
                margin = one.size / 2 if edges == "bounce" else 0
                assert (one.position >= margin).all() and (one.position <= motion.SIDE - margin).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_what_nothing_pushes_goes_straight_on(seed):
    (moving,) = bodies(seed, 1)
    start, velocity = moving.position, moving.velocity
    for number in range(1, 10):
        motion.step([moving], 0.0, "leave")
        np.testing.assert_allclose(moving.position, start + number * velocity)
