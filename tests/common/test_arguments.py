"""Recipes and their overrides; the reference's numbers in its recipes; and what a fuzzer makes of both."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bridle_hf.common.arguments import make_arguments, parse_command_line, read_yaml
from bridle_hf.common.errors import ArgumentError
from bridle_hf.interleaving.schedule import Schedule
from bridle_hf.pretraining.arguments import PretrainArguments
from bridle_hf.pretraining.configs import make_configs


RECIPES = Path(__file__).parents[2] / "bridle_hf" / "recipes"
PRETRAINING = sorted(path for path in RECIPES.glob("*.yaml") if "phases:" in path.read_text(encoding="utf-8"))
NEEDED = ["--data", "d", "--output_dir", "o"]


def parse(recipe: Path | str | None = None, *options: str) -> PretrainArguments:
    return parse_command_line(PretrainArguments, argv=[*([str(recipe)] if recipe else []), *NEEDED, *options])[0]


def write(tmp_path: Path, **values) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def refusal(*arguments) -> str:
    """The one line of an error."""
    with pytest.raises(ArgumentError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Values


def test_an_option_beats_the_recipe_and_the_recipe_the_default(tmp_path):
    recipe = write(tmp_path, seed=3, log_every=7, encoder={"hidden_size": 8, "patch_size": [4, 2]}, augment=True)
    args = parse(recipe, "--seed", "5", "--seed", "6", "--encoder.hidden_size", "32", "--encoder.mask_ratio=5e-1")
    assert (args.seed, args.log_every, args.save_every) == (6, 7, 1000)
    assert args.encoder == {"hidden_size": 32, "patch_size": [4, 2], "mask_ratio": 0.5} and args.augment is True
    assert parse(recipe, "--encoder", "{hidden_size: 4}").encoder == {"hidden_size": 4}
    assert parse(recipe, "--augment", "false").augment is False
    assert parse(None, "--augment").augment is True


def test_lists_booleans_and_null(tmp_path):
    values = {"micro_batch_size": None, "exclude_groups": ["a", 4], "adam_betas": [0.8, 0.9], "max_grad_norm": 1}
    args = parse(write(tmp_path, resume=False, **values))
    assert args.micro_batch_size is None and args.exclude_groups == ["a", "4"] and args.resume is False
    assert args.adam_betas == [0.8, 0.9] and args.max_grad_norm == 1.0
    assert parse(None, "--exclude_groups", "x", "y").exclude_groups == ["x", "y"]


def test_phases_by_number(tmp_path):
    recipe = write(tmp_path, phases=[{"train": "encoder", "steps": 5}, {"train": "tokenizer", "steps": 6}])
    args = parse(recipe, "--phases.1.learning_rate", "5e-4", "--phases.0.start", "continue")
    assert list(args.phases) == [
        {"train": "encoder", "steps": 5, "start": "continue"},
        {"train": "tokenizer", "steps": 6, "learning_rate": 5e-4},
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E3", 5000.0), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("3", 3), ("no", "no"), ("true", True),
     ("off", "off"), ("'1e-4'", "1e-4"), ("null", None), ("2020-01-01", "2020-01-01"), ("[1, 2e0]", [1, 2.0]),
     ("010", "010"), ("-0", 0), ("1:30", "1:30"), ("1_000", "1_000"), ("00.5", "00.5"), ("0.5", 0.5)],
)  # fmt: skip
def test_numbers_and_words_are_those_of_yaml_1_2(text, value):
    """`learning_rate: 5e-4` is a number to everybody but YAML 1.1, and `mixed_precision: no` a word."""
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


def test_a_word_that_yaml_1_1_takes_for_a_boolean(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("mixed_precision: no\ntracker: none\nphases: [{train: encoder, steps: 3, learning_rate: 5e-4}]\n")
    args = parse(path)
    assert (args.mixed_precision, args.tracker, args.phases[0]["learning_rate"]) == ("no", "none", 5e-4)


# Recipes


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_pretraining_recipes_parse_and_build(path):
    args = parse(path)
    encoder, tokenizer = make_configs(args)
    schedule = Schedule(args.phases, 1_900_000 / args.global_batch_size, args.steps_scale)
    assert schedule.total_steps > 0 and encoder.patch_grid == tokenizer.patch_grid


def test_the_models_keep_how_frames_are_taken():
    for model in make_configs(parse(RECIPES / "video_demo.yaml")):
        assert (model.frame_stride, model.frame_sampling) == (1, "stride")
    encoder, _ = make_configs(parse(RECIPES / "video_demo.yaml", "--loader", "{sampling: segments}"))
    assert (encoder.frame_stride, encoder.frame_sampling) == (4, "segments")
    with pytest.raises(ValueError, match=r"loader\.stride is 'x': expected a value like 4"):
        make_configs(parse(RECIPES / "video_demo.yaml", "--loader.stride", "x"))
    with pytest.raises(ValueError, match=r"encoder\.frame_stride is 2, but the loader's is 1"):
        make_configs(parse(RECIPES / "video_demo.yaml", "--encoder.frame_stride", "2"))


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - set(PRETRAINING)), ids=lambda path: path.stem)
def test_fine_tuning_recipes_parse(path):
    finetune = pytest.importorskip("bridle_hf.finetuning.finetune")
    types = (finetune.FinetuneArguments, finetune.FinetuneTrainingArguments)
    names = {field.name for kind in types for field in dataclasses.fields(kind)}
    assert read_yaml(path.read_text(encoding="utf-8")).keys() <= names


def test_the_reference_stands_in_its_recipes():
    """The reference's scripts, rows "audio encoder", "audio tokenizer" and "audio joint"; and its sizes."""
    base, joint, single = (parse(RECIPES / f"audio_{name}.yaml") for name in ("base", "base_joint", "vq_base"))
    for args in (base, joint, single):
        encoder, tokenizer = make_configs(args)
        assert (args.global_batch_size, args.adam_betas, args.weight_decay, args.augment) == (
            1024,
            [0.9, 0.95],
            1e-4,
            True,
        )
        assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.num_attention_heads) == (768, 12, 12)
        assert (encoder.patch_grid, encoder.mask_ratio, args.masks) == ((64, 8), 0.8, {"random": 1.0})
        assert (encoder.decoder_type, encoder.decoder_hidden_size, encoder.decoder_num_hidden_layers) == (
            "swin",
            512,
            16,
        )
        assert (tokenizer.estimator_num_hidden_layers, tokenizer.estimator_hidden_size, tokenizer.code_dim) == (
            3,
            768,
            256,
        )
        assert (args.processor["mean"], args.processor["std"]) == (-4.4446096, 3.3216383)
        codes = (1, 1024) if args is single else (4, 256)
        assert (
            (encoder.num_codebooks, encoder.codebook_size)
            == (tokenizer.num_codebooks, tokenizer.codebook_size)
            == codes
        )
    for args in (base, single):
        found = [
            (phase["train"], phase["epochs"], phase["warmup_epochs"], phase["learning_rate"]) for phase in args.phases
        ]
        assert found[:2] == [("encoder", 140, 10, 5e-4), ("tokenizer", 31, 2, 2e-4)] and found[2] == found[0]
    assert list(joint.phases) == [
        {"train": "joint", "epochs": 200, "warmup_epochs": 10, "learning_rate": 5e-4, "tokenizer_every": 4,
         "tokenizer_loss_weight": 0.2}
    ]  # fmt: skip


# Errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sead", "1"], "unknown argument '--sead'; did you mean 'seed'?"),
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--seed", "1", "2"], "--seed: '2' is one value too many"),
        (["--seed", "-1"], "--seed is -1: expected 0 to"),
        (["--seed"], "--seed"),
        (["--augment", "maybe"], "--augment"),
        (["--modality", "smell"], "--modality"),
        (["--global_batch_size", "0"], "--global_batch_size is 0"),
        (["--micro_batch_size", "0"], "--micro_batch_size is 0"),
        (["--steps_scale", "nan"], "--steps_scale is nan"),
        (["--steps_scale", "inf"], "--steps_scale is inf"),
        (["--log_every", "0"], "--log_every is 0"),
        (["--keep_last", "0"], "--keep_last is 0"),
        (["--adam_betas", "0.9"], "--adam_betas is [0.9]: expected two numbers"),
        (["--encoder", "[1]"], "--encoder: expected a mapping"),
        (["--encoder", "{a: [}"], "--encoder: not YAML"),
        (["--phases", "{train: encoder}"], "--phases: expected a list of mappings"),
        (["--encoder.hidden_size"], "--encoder.hidden_size: expected a value"),
        (["--encoder.hidden_size", "--seed", "1"], "--encoder.hidden_size: expected a value"),
        (["--encoder.hidden_size", "{"], "--encoder.hidden_size: not YAML"),
        (["--encoder", "{a: 1}", "--encoder.b", "1"], "--encoder is given as a whole and in parts"),
        (["--phases.0.steps", "3"], "--phases.0.steps: the recipe has no such entry"),
        (["--endoder.hidden_size", "3"], "unknown argument '--endoder.hidden_size'; did you mean 'encoder'?"),
        (["--seed.x", "3"], "--seed"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_one_line_that_names_the_field(options, expected):
    assert expected in refusal(None, *options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede: 1", "unknown key 'sede'; did you mean 'seed'?"),
        ("seed: [1, 2]", "--seed: '2' is one value too many"),
        ("seed: {a: 1}", "--seed"),
        ("encoder: 5", "--encoder: expected a mapping"),
        ("phases: [encoder]", "--phases"),
        ("phases: {train: encoder}", "--phases"),
        ("adam_betas: []", "--adam_betas"),
        ("seed: [", "not YAML"),
        ("- seed", "expected a mapping of names to values"),
        ("", "expected a mapping of names to values"),
        ("1: 2", "expected a mapping of names to values"),
        ("global_batch_size: many", "--global_batch_size"),
    ],
    ids=repr,
)
def test_wrong_recipes_are_one_line_that_names_the_field(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_recipes_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.yaml")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "decode byte" in refusal(tmp_path / "image.yaml")


def test_a_recipe_lies_outside_of_what_is_written(tmp_path):
    """--overwrite might remove it; by its path through a link, too, and from Python."""
    recipe, link = tmp_path / "out" / "figures" / "recipe.yaml", tmp_path / "link"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("phases: [{train: encoder, steps: 2}]")
    link.symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", link):
        words = ["--data", "d", "--output_dir", str(out), "--overwrite"]
        with pytest.raises(ArgumentError, match=r"recipe\.yaml lies inside output_dir"):
            parse_command_line(PretrainArguments, argv=[str(recipe), *words])
        with pytest.raises(ArgumentError, match=r"recipe\.yaml lies inside output_dir"):
            make_arguments(PretrainArguments, recipe=str(recipe), values={"data": "d", "output_dir": str(out)})
    parse_command_line(PretrainArguments, argv=[str(recipe), "--data", "d", "--output_dir", str(tmp_path / "out2")])


def test_what_is_required_is_asked_for():
    with pytest.raises(ArgumentError, match="--data"):
        parse_command_line(PretrainArguments, argv=["--output_dir", "o"])


# Fuzz

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["1e-4", "no", "{", "[1", "--seed", "nan", "", "encoder", 10**400, -1, 0, 1e308, float("inf")]),
)  # fmt: skip
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
NAMES = [field.name for field in dataclasses.fields(PretrainArguments)]
SECTIONS = {
    "encoder": {
        "hidden_size": 64, "patch_size": [16, 8], "mask_ratio": 0.5, "num_attention_heads": 4, "num_codebooks": 2,
        "max_length": 96, "modality": "audio",
    },
    "tokenizer": {
        "code_dim": 8, "teacher_layers": [0, 1], "codebook_size": 256, "tokenizer_type": "self_distilled",
        "num_soft_codes": 3, "ema_decay": 0.9,
    },
}  # fmt: skip
PHASE = {
    "train": ["encoder", "tokenizer", "alternate", "joint"], "steps": [5, 1000],
    "warmup_steps": [2], "learning_rate": [1e-3], "start": ["fresh", "continue"], "switch_every": [3],
    "tokenizer_every": [2], "tokenizer_learning_rate": [1e-4], "tokenizer_loss_weight": [0.2],
}  # fmt: skip


def phase_entries():
    good = {name: st.sampled_from(values) for name, values in PHASE.items()}
    right = st.fixed_dictionaries({"train": good.pop("train"), "steps": good.pop("steps")}, optional=good)
    odd = st.dictionaries(st.sampled_from([*PHASE, "stepz"]), ODD, min_size=1, max_size=2)
    return st.builds(lambda entry, changes, number: {**entry, **(changes if number == 5 else {})}, right, odd,
                     st.integers(1, 5))  # fmt: skip


def one_in(draw, number: int) -> bool:
    return draw(st.integers(1, number)) == number


@st.composite
def recipes(draw):
    """Mostly right, so that what is wrong gets far."""
    values = {}
    if one_in(draw, 4):
        values = draw(st.dictionaries(st.sampled_from([*NAMES, "sead"]), VALUES, max_size=2))
    for name, fields in SECTIONS.items():
        if one_in(draw, 2):
            values[name] = draw(
                st.fixed_dictionaries({}, optional={key: st.just(value) for key, value in fields.items()})
            )
        if one_in(draw, 4):
            values[name] = draw(st.dictionaries(st.sampled_from([*fields, "hiden_size"]), VALUES, max_size=2))
    if not one_in(draw, 10):
        values["phases"] = draw(st.lists(phase_entries(), min_size=1, max_size=3))
    return values


@st.composite
def command_lines(draw):
    names = [*NAMES, "encoder.hidden_size", "tokenizer.x", "phases.0.steps", "phases.7.steps", "encoder.", "sead"]
    options = []
    for _ in range(draw(st.integers(1, 3)) if one_in(draw, 3) else 0):
        options.append(f"--{draw(st.sampled_from(names))}")
        text = draw(st.one_of(VALUES.map(str), st.sampled_from(["3", "0.5", "true"]), st.text(max_size=6)))
        if draw(st.booleans()):
            options[-1] += f"={text}"
        elif not one_in(draw, 6):
            options.append(text)
    return options


def starts_or_names_the_field(recipe: Path, options: list[str], written: list[str]) -> bool:
    """Everything of a run that depends on the arguments alone: whether it would start."""
    try:
        args = parse(recipe, *options)
        make_configs(args)
        Schedule(args.phases, 24 / args.global_batch_size, args.steps_scale)
        json.dumps(vars(args))
        return True
    except ValueError as error:
        # What the command makes a line of.
        message = str(error)
    assert "\n" not in message and len(message) > 10
    named = [*NAMES, *written, "phases", "arguments", "recipe", "argument"]
    assert any(name and name.split(".")[0] in message for name in named), message
    return False


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes(), command_lines())
@example({}, ["--encoder_from=3"])  # no folder, nor an id of the Hub
def test_any_recipe_and_command_line_starts_or_ends_with_one_line(tmp_path, values, options):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    starts_or_names_the_field(path, options, list(values))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_a_recipe_or_one_line(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    starts_or_names_the_field(path, [], [])


@pytest.mark.parametrize("text", ["encoder: {hidden_size: 8}\nencoder: {num_codebooks: 2}\n", "a: {b: 1, c: 2, b: 3}"])
def test_a_name_twice_is_refused(text):
    with pytest.raises(ValueError, match=r"(encoder|b) is there twice in one mapping"):
        read_yaml(text)


def test_an_empty_list_of_a_recipe_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("modality: audio\nexclude_groups: []\nphases: [{train: encoder, steps: 1}]\n")
    (args,) = parse_command_line(PretrainArguments, argv=[str(path), "--data", "d", "--output_dir", "o"])
    assert args.exclude_groups == []
